"""Typed configuration: model sizes (`models`), runs (`run`) and YAML loading (`loading`)."""
