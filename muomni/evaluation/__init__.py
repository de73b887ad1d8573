"""Held-out metrics of each stage, compared with trivial baselines."""
