"""What the server that ranks are forked from imports, once for all of them (see tests/ranks.py)."""

import gc
import os
from importlib import import_module

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import_module("muomni.distributed.deepspeed_import").import_deepspeed()
for name in ("mlflow", "muomni.training.session"):
    import_module(name)

# A rank that looked at these objects in a collection would copy the pages that it shares with the others.
gc.collect()
gc.freeze()
