"""Trains all stages of a run in dependency order, locally or on Slurm."""
