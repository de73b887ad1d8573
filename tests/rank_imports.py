"""Imports of the fork server, shared by all ranks that are forked from it (see tests/ranks.py)."""

import gc
import os
from importlib import import_module

os.environ["DS_ACCELERATOR"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import_module("muomni.distributed.deepspeed_import").import_deepspeed()
for name in ("mlflow", "muomni.training.session"):
    import_module(name)

# Garbage collection on a rank would touch these objects and so copy memory pages that all ranks share.
gc.collect()
gc.freeze()
