"""Assignment of visible GPUs to ranks, and errors for GPUs that torch cannot use. No GPU is needed."""

from pathlib import Path

import pytest
import torch

from muomni.distributed import devices
from muomni.distributed.devices import (
    assign_gpus,
    check_gpus_usable,
    choose_gpus,
    use_assigned_gpus,
    visible_gpus,
)
from muomni.errors import ConfigError, MachineError

OLD_DRIVER = (
    "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
)
NEW_DRIVER = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"


@pytest.fixture(autouse=True)
def machine_without_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(devices, "CONTROL_FILE", tmp_path / "nvidiactl")
    monkeypatch.setattr(devices, "DRIVER_FILE", tmp_path / "version")
    monkeypatch.setattr(devices.shutil, "which", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", "13.0")


@pytest.mark.parametrize(
    ("visible", "first", "chosen"),
    [
        ("4,5,6,7", 0, ["4", "5"]),
        ("4,5,6,7", 2, ["6", "7"]),
        ("GPU-8f2a, GPU-91bc,GPU-aa,GPU-bb", 2, ["GPU-aa", "GPU-bb"]),
        ("MIG-1,MIG-2,MIG-3,MIG-4", 1, ["MIG-2", "MIG-3"]),
        (None, 2, ["2", "3"]),
    ],
)
def test_ranks_get_their_share_of_the_visible_gpus(
    visible: str | None, first: int, chosen: list[str]
) -> None:
    environ = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert choose_gpus(environ, 4, first, 2) == chosen
    assign_gpus(environ, chosen)
    assert visible_gpus(environ) is None
    environ["CUDA_VISIBLE_DEVICES"] = "0,1"  # what DeepSpeed's launcher sets
    use_assigned_gpus(environ)
    assert visible_gpus(environ) == chosen


@pytest.mark.parametrize("visible", ["4,5", "4,5,-1,6"])
def test_too_many_ranks_are_rejected(visible: str) -> None:
    with pytest.raises(ConfigError, match=f"3 ranks need one GPU each, but 2 are .*={visible}"):
        choose_gpus({"CUDA_VISIBLE_DEVICES": visible}, 2, 0, 3)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"CUDA_VISIBLE_DEVICES": "", "SLURM_GPUS_ON_NODE": "8"},
        {"CUDA_VISIBLE_DEVICES": "-1"},
        {"CUDA_VISIBLE_DEVICES": "NoDevFiles"},
        {"SLURM_GPUS_ON_NODE": "0"},
        {"CUDA_VISIBLE_DEVICES": "0", "DS_ACCELERATOR": "cpu"},
    ],
)
def test_machine_without_gpus_or_with_hidden_ones_uses_the_cpu(environ: dict[str, str]) -> None:
    check_gpus_usable(environ)


@pytest.mark.parametrize(
    ("environ", "sign"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, "SLURM_GPUS_ON_NODE=8"),
        ({"SLURM_JOB_GPUS": "0"}, "SLURM_JOB_GPUS=0"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-8f2a"}, "CUDA_VISIBLE_DEVICES=GPU-8f2a"),
    ],
)
def test_gpus_of_the_job_that_torch_cannot_use_are_an_error(
    environ: dict[str, str], sign: str
) -> None:
    with pytest.raises(MachineError, match=rf"there are GPUs \({sign}\), but .*DS_ACCELERATOR=cpu"):
        check_gpus_usable(environ)


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (OLD_DRIVER, r"driver 550\.54\.15 is too old .*CUDA 13\.0 needs 580 or newer"),
        (NEW_DRIVER, r"can use none \(driver 580\.65\.06\); check nvidia-smi"),
        (None, r"can use none; check nvidia-smi"),
    ],
)
def test_the_driver_is_named(driver: str | None, reason: str) -> None:
    devices.CONTROL_FILE.touch()
    if driver is not None:
        devices.DRIVER_FILE.write_text(driver)
    with pytest.raises(MachineError, match=f"nvidiactl exists.*{reason}"):
        check_gpus_usable({})


def test_a_torch_for_cpus_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(MachineError, match=r"nvidia-smi is installed.*built for CPUs only"):
        check_gpus_usable({})
