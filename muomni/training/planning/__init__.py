"""Dry runs: model sizes, FLOPs, and memory, predicted before a run."""
