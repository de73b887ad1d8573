"""Command line of data preparation."""
