"""Deduplication, exclusion, and mixing reports."""
