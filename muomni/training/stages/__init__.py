"""One module per stage, listed in `muomni/config/registry.py`."""
