"""The record of a run in MLflow: store, experiment, runs, and what they hold."""
