"""`muomni data VERB ...`: the commands of `python -m data_prep`."""

SUMMARY = "Prepare corpora: shard, verify, inspect."
EXAMPLES = ()


def main(argv: list[str]) -> None:
    """Pass all options to data_prep."""
    from data_prep.cli.main import main as data_prep_main

    data_prep_main(argv, "muomni data")
