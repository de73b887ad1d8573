"""From raw bytes to batches. Knows no models; rank numbers are arguments."""
