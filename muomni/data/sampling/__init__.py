"""Which samples form which micro-batch, and in which order."""
