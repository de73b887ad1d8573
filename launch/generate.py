"""`muomni generate`, from a checkout: `python launch/generate.py --run DIR ...`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muomni.cli.main import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
