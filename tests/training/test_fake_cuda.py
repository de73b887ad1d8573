"""A step of every stage on fake CUDA tensors: nothing waits for the device, no tensor is on another device.

Fake tensors have shapes and devices but no values, and need no GPU. They have no backward pass. Reading a
value raises, as does mixing devices; copies between devices are logged.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from muomni.config.run import RunConfig
from muomni.data.views.base import HOST_KEYS
from muomni.distributed.discovery import discover
from muomni.models.layers import moe
from muomni.models.speech import mel
from muomni.models.vision import vision_encoder
from muomni.models.vision.contrastive import pair_normalizers
from muomni.training.session import Request, prepare
from tests.models.vision.textbook_losses import gathered_features
from tests.training.engine.test_expert_parallel import moe_config
from tests.training.runs import thinker_config
from tests.training.stages.curves import stage_config
from tests.training.stages.sft.omni_runs import omni_run, write_root

CUDA = torch.device("cuda", 0)
STAGES = ("thinker", "experts", "audio_encoder", "vision_encoder", "codec", "talker", "sft")
# Dropout, and sizes that grouped matmuls have kernels for.
CHANGES: dict[str, dict[str, Any]] = {
    "audio_encoder": {"model": {"dropout": 0.1}},
    "talker": {"model": {"dropout": 0.1, "frame_dropout": 0.1}},
}
EXPERTS = {"num_experts": 4, "num_experts_per_token": 2, "expert_intermediate_size": 16}


@pytest.fixture(scope="module")
def omni_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("omni"))


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeTensorMode]:
    """Fake tensors, in place of constants that are copied to a device once."""

    def filters(config: Any, device: torch.device) -> Tensor:
        return torch.empty(config.num_fft // 2 + 1, config.num_mels, device=device)

    def window(num_fft: int, device: torch.device) -> Tensor:
        return torch.empty(num_fft, device=device)

    def statistics(device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.empty(3, 1, 1, device=device), torch.empty(3, 1, 1, device=device)

    def ctc_loss(log_probs: Tensor, *_: Tensor, **__: object) -> Tensor:
        return log_probs.sum((0, 2))

    # No fake kernel exists. The real one copies lengths between host and device, see `ctc.py`.
    monkeypatch.setattr(F, "ctc_loss", ctc_loss)
    monkeypatch.setattr(mel, "mel_filters", filters)
    monkeypatch.setattr(mel, "hann_window", window)
    monkeypatch.setattr(vision_encoder, "_pixel_statistics", statistics)
    monkeypatch.setattr(moe, "_is_hopper", lambda device: device.type == "cuda")
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        yield fake


class CopyLog(TorchDispatchMode):
    """Logs copies between host and device that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.num_ops = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.num_ops += 1
        name = func._schema.name.split("::")[1]
        if name == "_local_scalar_dense" and args[0].device.type == "cpu":
            return 0  # a value on the host, which fake tensors lack
        output, kwargs = func(*args, **(kwargs or {})), kwargs or {}
        source, target = args[0] if args else None, output
        if name in ("index_put", "index_put_", "_index_put_impl_"):
            source, target = args[2], args[0]
        elif name == "copy_":
            source, target = args[1], args[0]
        elif name != "_to_copy":
            return output
        assert isinstance(source, Tensor)
        if source.device.type != target.device.type and not kwargs.get("non_blocking"):
            self.waits.append(f"{func}: {source.device.type} to {target.device.type}")
        return output


def fake(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=CUDA)


def make_fake(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Replace weights by fake CUDA ones of `dtype`, and buffers by those of their own."""
    for part in model.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(fake(weight, dtype), weight.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = fake(buffer)


def config_of(stage: str, text_data: Path, media_data: Path, omni_root: Path) -> RunConfig:
    changes = CHANGES.get(stage, {})
    if stage == "experts":
        return moe_config(text_data, changes, EXPERTS)
    if stage == "thinker":
        return thinker_config(text_data, changes)
    if stage in ("talker", "sft"):
        return omni_run(stage, omni_root, changes)
    return stage_config(stage, media_data, changes)


# Stages without masks have no varlen attention.
CASES = [(stage, False) for stage in STAGES]
CASES += [(stage, True) for stage in STAGES if stage not in ("vision_encoder", "codec")]


@pytest.mark.parametrize(("stage", "uses_varlen"), CASES)
def test_a_step_waits_for_no_value_of_the_device(
    stage: str,
    uses_varlen: bool,
    text_data: Path,
    media_data: Path,
    omni_root: Path,
    request: pytest.FixtureRequest,
) -> None:
    config = config_of(stage, text_data, media_data, omni_root)
    session = prepare(Request(config, Path("none"), omni_root / "run", {}, "never"), discover({}))
    steps, batches = session.stage, [read.batch for read in session.feed.read(0)]
    steps.context.uses_varlen = uses_varlen
    frozen = steps.frozen_models()
    with torch.device("meta"):
        task = steps.build()
    request.getfixturevalue("mode")
    steps.set_up(task)
    steps.context.device = CUDA
    make_fake(task.train(), torch.bfloat16)
    for model in frozen:
        make_fake(model)
    on_device = [
        {name: tensor if name in HOST_KEYS else fake(tensor) for name, tensor in batch.items()}
        for batch in batches
    ]
    with CopyLog() as log:
        with torch.no_grad():
            window = [steps.prepare(batch) for batch in on_device]
        for batch in window:
            steps.loss_denominators(batch)
        outputs = [task(batch) for batch in steps.begin_step(task, window)]
        with torch.no_grad():
            steps.after_step(task, outputs[0].state, 1)
    assert log.num_ops > 200 and log.waits == []
    losses = [loss for output in outputs for loss in output.losses.values()]
    assert losses and all(loss.device == CUDA for loss in losses)


def test_waits_are_found(mode: FakeTensorMode) -> None:
    counts = torch.empty(4, dtype=torch.long, device=CUDA)
    for wait in (counts.tolist, lambda: int(counts[0]), counts.nonzero):
        with pytest.raises((DataDependentOutputException, RuntimeError)):
            wait()
    features = torch.empty(4, 8, device=CUDA)
    with CopyLog() as log:
        counts.cpu()
        counts[torch.empty(2, dtype=torch.long, device=CUDA)] = torch.tensor(1)
        torch.empty(3).to(CUDA)
        torch.empty(3).to(CUDA, non_blocking=True)
        gathered = gathered_features(features, features, counts)
        pair_normalizers(0, 4, gathered, torch.ones((), device=CUDA))
    assert [wait.split(": ")[1] for wait in log.waits] == ["cuda to cpu", *["cpu to cuda"] * 2]
