"""Metrics, recorders, profiler, and utilization; a failure here never stops a run."""
