"""Typed configuration: model sizes, run settings, stage options, and YAML loading."""
