"""Write shards: planning, worker processes, resuming, and finalizing."""
