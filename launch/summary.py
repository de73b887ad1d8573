"""The held-out results of all stages of a run beside trivial baselines, as a markdown table.

Reads what launch/evaluate.py wrote: `python launch/summary.py --run DIR`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muomni.errors import exit_on_error
from muomni.evaluation.report import read_reports, summary


def main() -> None:
    flags = argparse.ArgumentParser(prog="summary.py", description=__doc__)
    flags.add_argument("--run", type=Path, required=True, help="run folder")
    flags.add_argument("--all", action="store_true", help="also metrics without a baseline")
    arguments = flags.parse_args()
    with exit_on_error("summary"):
        print(summary(read_reports(arguments.run), with_all=arguments.all))


if __name__ == "__main__":
    main()
