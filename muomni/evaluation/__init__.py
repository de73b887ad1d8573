"""Held-out metrics of each stage beside trivial baselines."""
