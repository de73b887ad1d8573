"""The GPUs that a process may use, and why torch cannot use those that the machine has."""

import re
import shutil
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from muomni.errors import ConfigError, MachineError

VISIBLE = "CUDA_VISIBLE_DEVICES"
# DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES to 0, 1, ... of the machine, and cannot parse UUIDs. So ranks
# get their GPUs in this variable.
ASSIGNED = "MUOMNI_GPUS"
CONTROL_FILE = Path("/dev/nvidiactl")
DRIVER_FILE = Path("/proc/driver/nvidia/version")
# Oldest driver of each major version of CUDA (docs.nvidia.com/deploy/cuda-compatibility).
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}


def uses_cpu(environ: Mapping[str, str]) -> bool:
    """Whether the user chose the CPU."""
    return environ.get("DS_ACCELERATOR") == "cpu"


def visible_gpus(environ: Mapping[str, str]) -> list[str] | None:
    """The numbers, UUIDs, or MIG ids in CUDA_VISIBLE_DEVICES; None if it is unset, so all GPUs are visible."""
    text = environ.get(VISIBLE)
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


def choose_gpus(environ: Mapping[str, str], num_visible: int, first: int, number: int) -> list[str]:
    """The names of `number` GPUs from position `first` of the visible ones on.

    `num_visible` is torch's count of visible GPUs. Raises ConfigError if there are fewer.
    """
    names = visible_gpus(environ)
    if names is None:
        names = [str(index) for index in range(num_visible)]
    chosen = names[:num_visible][first : first + number]
    if len(chosen) < number:
        which = f" ({VISIBLE}={environ[VISIBLE]})" if VISIBLE in environ else ""
        raise ConfigError(
            f"{first + number} ranks need one GPU each, but {num_visible} "
            f"{'is' if num_visible == 1 else 'are'} visible{which}; use --ranks {num_visible}"
        )
    return chosen


def assign_gpus(environ: MutableMapping[str, str], gpus: list[str]) -> None:
    """Give the ranks below a launcher these GPUs; `environ` is that of the launcher."""
    # Otherwise the launcher prints that it ignores the variable.
    environ.pop(VISIBLE, None)
    environ[ASSIGNED] = ",".join(gpus)


def use_assigned_gpus(environ: MutableMapping[str, str]) -> None:
    """Make the GPUs that the launching command chose visible in a rank, before torch starts CUDA."""
    if ASSIGNED in environ:
        environ[VISIBLE] = environ[ASSIGNED]


def check_gpus_usable(environ: Mapping[str, str]) -> None:
    """Raise MachineError if there are GPUs; call it if torch finds none.

    Otherwise a run would silently train on the CPU, for example because the driver is too old for torch.
    """
    sign = None if uses_cpu(environ) else _sign_of_gpus(environ)
    if sign is None:
        return
    raise MachineError(
        f"there are GPUs ({sign}), but {_reason()}; or set DS_ACCELERATOR=cpu to use the CPU"
    )


def _sign_of_gpus(environ: Mapping[str, str]) -> str | None:
    """What says that this process should have GPUs, or None."""
    visible = visible_gpus(environ)
    if visible is not None:  # an empty list, -1, or Slurm's NoDevFiles hides all GPUs
        is_hidden = not visible or visible[0] in ("-1", "NoDevFiles")
        return None if is_hidden else f"{VISIBLE}={environ[VISIBLE]}"
    if environ.get("SLURM_GPUS_ON_NODE", "0") not in ("", "0"):
        return f"SLURM_GPUS_ON_NODE={environ['SLURM_GPUS_ON_NODE']}"
    if environ.get("SLURM_JOB_GPUS"):  # numbers of GPUs, such as 0,1
        return f"SLURM_JOB_GPUS={environ['SLURM_JOB_GPUS']}"
    if CONTROL_FILE.exists():
        return f"{CONTROL_FILE} exists"
    return "nvidia-smi is installed" if shutil.which("nvidia-smi") else None


def _reason() -> str:
    """Why torch finds no GPU, and the remedy."""
    import torch

    version = torch.__version__
    if torch.version.cuda is None:
        return f"torch {version} is built for CPUs only; run make install"
    driver, cuda = driver_version(), torch.version.cuda
    oldest = _OLDEST_DRIVER.get(int(cuda.partition(".")[0]))
    if driver is not None and oldest is not None and int(driver.partition(".")[0]) < oldest:
        return (
            f"their driver {driver} is too old for torch {version} (CUDA {cuda} needs {oldest} or newer); "
            f"update the driver, install a torch build for an older CUDA (see pytorch.org)"
        )
    found = f" (driver {driver})" if driver else ""
    return (
        f"torch {version} can use none{found}; check nvidia-smi and the access of this container or job to "
        f"its GPUs"
    )


def driver_version() -> str | None:
    """The version of NVIDIA's kernel driver, such as 550.54.15, or None."""
    if not DRIVER_FILE.is_file():
        return None
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", DRIVER_FILE.read_text(encoding="utf-8"))
    return found.group() if found else None
