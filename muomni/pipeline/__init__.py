"""All stages of a run, in the order of their dependencies."""
