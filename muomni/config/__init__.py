"""Typed configuration: model sizes (`models`), run settings (`run`) and YAML loading (`loading`)."""
