"""The training loop, the stage interface, and the checks before a run."""
