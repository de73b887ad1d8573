"""`python -m tests.parity`: run the parity matrix (matrix.py).

A separate module, as spawned ranks import the main module unless it has this name, and they must set
their environment before torch is imported.
"""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # the reference runs on the CPU even if there is a GPU
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.parity.matrix import main

main()
