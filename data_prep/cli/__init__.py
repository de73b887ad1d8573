"""The command lines of `python -m data_prep`."""
