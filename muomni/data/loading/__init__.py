"""Loads batches with worker processes and copies them to the device."""
