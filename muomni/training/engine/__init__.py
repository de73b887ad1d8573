"""DeepSpeed and what configures it; no other package of muomni.training imports it."""
