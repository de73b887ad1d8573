"""Metrics shared by several stages."""
