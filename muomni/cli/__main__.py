"""`python -m muomni.cli VERB`, for who has not installed the command."""

from muomni.cli import main

main()
