"""Rank discovery, collectives, and setup of DeepSpeed on CPU ranks."""
