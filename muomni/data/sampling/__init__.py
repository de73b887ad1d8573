"""The order of samples and how they form global batches."""
