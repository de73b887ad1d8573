"""Run the command line: `python -m data_prep`."""

from data_prep.cli.main import main

if __name__ == "__main__":
    main()
