"""Batches from worker processes to the device."""
