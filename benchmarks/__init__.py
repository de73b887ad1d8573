"""Every metric in the documentation comes from a script here; raw results lie in `results/`."""
