"""Verbs about the records of runs: comparison, and synchronization with MLflow."""
