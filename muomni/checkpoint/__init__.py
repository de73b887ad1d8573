"""Save, verify, and resume checkpoints; write and load exports; convert weights to published formats."""
