"""One rank of a training run: `deepspeed launch/train.py --stage STAGE ...` (docs/configuration.md)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muomni.cli.train import main_of_rank

if __name__ == "__main__":
    main_of_rank()
