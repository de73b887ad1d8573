"""Print the discovered environment of this rank as one JSON line."""

import json
import os
import socket

from muomni.distributed.discovery import discover, export_environment

export_environment(discover(), os.environ)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
found = {name: os.environ[name] for name in names}
found["gpus"] = os.environ.get("CUDA_VISIBLE_DEVICES", "")
print(json.dumps({**found, "host": socket.gethostname()}))
