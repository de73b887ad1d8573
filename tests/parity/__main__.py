"""`python -m tests.parity`: the parity matrix, see `matrix.py`.

A module of its own, since spawned ranks import the one that was started, unless it has this name; and
they must set their environment before anything imports torch.
"""

import os

os.environ["DS_ACCELERATOR"] = "cpu"  # the reference runs there, whatever the machine has
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.parity.matrix import main

main()
