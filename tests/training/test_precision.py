"""Which device a rank takes, and which formats it refuses there."""

import pytest
import torch

from muomni.errors import ConfigError
from muomni.training.precision import pick_device, pick_precision


def test_cpu_can_be_asked_for_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert (pick_device(1), taken) == (torch.device("cpu"), [])
    monkeypatch.delenv("DS_ACCELERATOR")
    assert (pick_device(1), taken) == (torch.device("cuda", 1), [1])


def test_gpu_without_bf16_trains_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    cuda = torch.device("cuda", 0)
    assert pick_precision("auto", cuda) == "fp16"
    with pytest.raises(ConfigError, match="Old GPU does not compute in bf16"):
        pick_precision("bf16", cuda)
