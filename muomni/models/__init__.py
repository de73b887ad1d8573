"""Mathematics only: no files, no process groups, no DeepSpeed."""
