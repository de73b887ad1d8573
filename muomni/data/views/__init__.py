"""Views decode samples into examples and collate them into batches, one view per file."""
