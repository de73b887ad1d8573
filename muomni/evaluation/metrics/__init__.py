"""Metrics that several evaluators share."""
