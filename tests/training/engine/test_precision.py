"""Choice of the device, and precisions that it does not support."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.distributed.discovery import Ranks
from muomni.errors import ConfigError, MachineError, UpstreamError
from muomni.evaluation import evaluator
from muomni.evaluation.evaluator import evaluate
from muomni.evaluation.request import EvaluationRequest
from muomni.inference import load
from muomni.inference.generate import GenerationRequest, generate
from muomni.observe.peak_flops import find_peak
from muomni.training.engine import precision as precision_module
from muomni.training.engine.precision import (
    describe_precision,
    pick_device,
    pick_precision,
    use_tf32,
)
from tests.training.runs import thinker_config

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")


@pytest.fixture
def restored_tf32() -> Iterator[None]:
    """TF32 is a setting of the entire process."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_the_cpu_can_be_chosen_on_a_gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = simulate_gpus(monkeypatch, number=2)
    monkeypatch.setattr(precision_module, "_try_device", lambda device: None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert (pick_device(1), taken) == (torch.device("cpu"), [])
    monkeypatch.delenv("DS_ACCELERATOR")
    assert (pick_device(1), taken) == (torch.device("cuda", 1), [1])


def simulate_gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> list[int]:
    """Let torch report GPUs; returns the devices that are set."""
    taken: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return taken


def test_a_rank_without_a_gpu_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(monkeypatch, number=2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    with pytest.raises(MachineError, match=r"local rank 2 has no GPU: 2 visible .*=4,5\)"):
        pick_device(2)


def test_gpus_that_torch_cannot_use_are_not_replaced_by_the_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulate_gpus(monkeypatch, number=0)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(MachineError, match=r"there are GPUs \(SLURM_GPUS_ON_NODE=8\), but"):
        pick_device(0)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert pick_device(0) == torch.device("cpu")


def test_a_visible_gpu_that_does_not_compute_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpus(monkeypatch, number=1)

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nmore lines")

    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(
        MachineError, match=r"GPU 0 is visible but unusable \(CUDA error: .* busy\)"
    ):
        pick_device(0)


def test_gpu_without_bf16_trains_in_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    cuda = torch.device("cuda", 0)
    assert pick_precision("auto", cuda) == "fp16"
    with pytest.raises(ConfigError, match="Old GPU does not compute in bf16"):
        pick_precision("bf16", cuda)


def test_auto_is_bf16_on_gpus_that_support_it_and_fp32_on_a_cpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert pick_precision("auto", CUDA) == "bf16"
    assert pick_precision("auto", CPU) == "fp32"
    for given in ("fp32", "bf16", "fp16"):
        assert pick_precision(given, CUDA) == pick_precision(given, CPU) == given


@pytest.mark.parametrize(
    ("changes", "precision", "device", "words"),
    [
        ({"precision": "auto"}, "fp32", CPU, "fp32 (chosen by auto) on cpu"),
        ({"precision": "auto"}, "bf16", CUDA, "bf16 (chosen by auto) on cuda"),
        ({"precision": "fp16"}, "fp16", CUDA, "fp16 on cuda"),
        ({}, "fp32", CUDA, "fp32 without TF32 (tf32=true is faster) on cuda"),
        ({"tf32": True}, "fp32", CUDA, "fp32 with TF32 on cuda"),
        ({"tf32": True}, "fp32", CPU, "fp32 on cpu"),
    ],
)
def test_a_run_describes_its_precision(
    changes: dict[str, Any], precision: str, device: torch.device, words: str
) -> None:
    assert describe_precision(thinker_config(Path(), changes), precision, device) == words


@pytest.mark.usefixtures("restored_tf32")
@pytest.mark.parametrize("wanted", [True, False])
def test_tf32_follows_the_config_and_sets_the_peak(
    wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_float32_matmul_precision("highest" if wanted else "high")
    torch.backends.cudnn.allow_tf32 = not wanted
    use_tf32(wanted, "fp32", CUDA)
    assert torch.backends.cuda.matmul.allow_tf32 is wanted
    assert torch.backends.cudnn.allow_tf32 is wanted
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    peak, _ = find_peak(CUDA, "fp32", None)
    assert peak is not None and peak.source.endswith("tf32" if wanted else "fp32")


@pytest.mark.usefixtures("restored_tf32")
@pytest.mark.parametrize(("precision", "device"), [("bf16", CUDA), ("fp32", CPU)])
def test_other_precisions_keep_the_defaults_of_torch(precision: str, device: torch.device) -> None:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    use_tf32(not before[0], precision, device)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_tf32_with_16_bits_is_rejected() -> None:
    with pytest.raises(ConfigError, match="tf32 needs precision fp32, not bf16"):
        thinker_config(Path(), {"precision": "bf16", "tf32": True})


@pytest.mark.usefixtures("restored_tf32")
@pytest.mark.parametrize("tf32", [True, False])
def test_evaluation_and_generation_choose_tf32_on_gpus(
    tf32: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (evaluator, load):
        monkeypatch.setattr(module, "pick_device", lambda _: CUDA)
    evaluation = EvaluationRequest("thinker", tmp_path, tf32=tf32)
    generation = GenerationRequest(tmp_path, text="hello", tf32=tf32)
    for run in (partial(evaluate, evaluation, Ranks()), partial(generate, generation)):
        torch.set_float32_matmul_precision("highest" if tf32 else "high")
        with pytest.raises(UpstreamError):
            run()
        assert torch.backends.cuda.matmul.allow_tf32 is tf32
