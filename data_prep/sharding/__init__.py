"""Samples to shards: plan, worker processes, resuming, finalizing."""
