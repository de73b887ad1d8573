"""Verification, statistics, and previews of datasets."""
