"""Converts text and conversations to token ids."""
