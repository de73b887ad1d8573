"""Predictions made before a run: dry run and memory."""
