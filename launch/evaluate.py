"""One rank of an evaluation: `deepspeed launch/evaluate.py --stage STAGE --run DIR`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muomni.cli.evaluate import main_of_rank

if __name__ == "__main__":
    main_of_rank()
