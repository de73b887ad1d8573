"""The order of samples and how they form micro-batches."""
