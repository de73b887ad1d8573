"""The DeepSpeed engine and its configuration; no other package of muomni.training imports DeepSpeed."""
