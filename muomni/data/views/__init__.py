"""A sample to an example, examples to a batch: one module per stage."""
