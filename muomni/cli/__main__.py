"""`python -m muomni.cli VERB`, for launchers that start modules."""

from muomni.cli.main import main

main()
