"""`muomni pipeline`, from a checkout: `python launch/pipeline.py --run DIR ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muomni.cli.pipeline import main

if __name__ == "__main__":
    main(sys.argv[1:], "pipeline.py")
