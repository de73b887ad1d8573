"""One module per stage; `muomni/config/registry.py` is the table of them."""
