"""Print the held-out metrics of all stages of a run and their baselines as a markdown table.

Reads the reports of launch/evaluate.py: `python launch/summary.py --run DIR`.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muomni.errors import exit_on_error
from muomni.evaluation.report import read_reports, summary


def main() -> None:
    flags = argparse.ArgumentParser(
        prog="summary.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument("--run", type=Path, required=True, help="run folder")
    flags.add_argument("--all", action="store_true", help="include metrics without a baseline")
    arguments = flags.parse_args()
    with exit_on_error("summary"):
        print(summary(read_reports(arguments.run), with_all=arguments.all))


if __name__ == "__main__":
    main()
