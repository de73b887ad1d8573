"""`training.attention` in stages that pack or pad sequences, and where varlen is refused."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.config.run import RunConfig
from muomni.data.loading.loader import PlannedDataset
from muomni.distributed.discovery import discover
from muomni.errors import ConfigError
from muomni.models.layers import attention as attention_layer
from muomni.models.layers.masks import window_size
from muomni.training.engine import attention
from muomni.training.engine.engine import Engine
from muomni.training.planning.step_trace import trace_step
from muomni.training.session import Request, open_loop, prepare
from tests.models.layers.test_varlen_attention import attend_to_each
from tests.training.runs import thinker_config
from tests.training.stages.curves import stage_config
from tests.training.stages.sft.omni_runs import omni_run, write_root

VARLEN = {"training": {"attention": "varlen"}}


@pytest.fixture(scope="module")
def omni_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("omni"))


def first_losses(config: RunConfig, upstream: Path) -> dict[str, torch.Tensor]:
    """The losses of the first micro-batch, with seeded weights."""
    session = prepare(Request(config, Path("none"), upstream, {}, "never"), discover({}))
    stage: Any = session.stage
    torch.manual_seed(0)
    task = stage.build().train()
    stage.set_up(task)
    dataset = PlannedDataset(session.planned.source, stage.view(), 0)
    batch = dataset[session.planned.plan.rank_step(0, 0, 1)[0]].tensors
    return {name: loss.detach() for name, loss in task(stage.prepare(batch)).losses.items()}


@pytest.mark.parametrize("stage", ["thinker", "audio_encoder", "talker", "sft"])
def test_varlen_losses_equal_those_with_a_mask(
    stage: str,
    text_data: Path,
    media_data: Path,
    omni_root: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def stand_in(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(len(args[0]))
        return attend_to_each(*args, **kwargs)

    def config(changes: dict[str, Any]) -> RunConfig:
        if stage == "thinker":
            return thinker_config(text_data, changes)
        if stage == "audio_encoder":
            return stage_config(stage, media_data, changes)
        return omni_run(stage, omni_root, changes)

    expected = first_losses(config({}), omni_root / "run")
    # A CPU stands in for the device.
    monkeypatch.setattr(attention, "use_varlen", lambda wanted, *_: wanted == "varlen")
    monkeypatch.setattr(attention_layer, "varlen_attn", stand_in)
    found = first_losses(config(VARLEN), omni_root / "run")
    assert calls
    assert found.keys() == expected.keys()
    for name, loss in found.items():
        torch.testing.assert_close(loss, expected[name], atol=0, rtol=1e-5)


def test_a_step_with_the_real_kernel_can_be_traced_without_a_mask(
    text_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only shapes are computed, forward and backward, by the kernel's own shape functions."""
    monkeypatch.setattr(attention, "use_varlen", lambda wanted, *_: wanted == "varlen")
    peaks = {}
    for way in ("mask", "varlen"):
        # A document of more than a quarter of a row; otherwise a CPU would use windows for the mask.
        changes = {
            "training": {"attention": way},
            "batch": {"seq_len": 128, "global_tokens": 512, "micro_sequences": 4},
        }
        config = thinker_config(text_data, changes)
        session = prepare(Request(config, Path("none"), Path(), {}, "never"), discover({}))
        dataset = PlannedDataset(session.planned.source, session.stage.view(), 0)
        batch = dataset[session.planned.plan.rank_step(0, 0, 1)[0]].tensors
        assert window_size(batch["document_ids"]) is None
        trace = trace_step(session.stage, [batch], "bf16", 1)
        peaks[way] = max(sum(stretch.live.values()) for stretch in trace.stretches)
    assert peaks["varlen"] < peaks["mask"]


def test_varlen_is_rejected_on_a_cpu_before_a_run_starts(text_data: Path) -> None:
    with pytest.raises(ConfigError, match=r"compute capability 8\.0 or more, this run is on cpu"):
        first_losses(thinker_config(text_data, VARLEN), Path())


@pytest.mark.parametrize("stage", ["vision_encoder", "codec"])
def test_varlen_is_rejected_for_a_stage_without_masks(stage: str, media_data: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"pack or pad sequences \(thinker, audio_encoder, talker, sft"
    ):
        first_losses(stage_config(stage, media_data, VARLEN), Path())


def test_varlen_is_rejected_where_kernels_are_unsupported(
    text_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = prepare(
        Request(thinker_config(text_data), Path("none"), Path(), {}, "never"), discover({})
    )
    sizes: Any = session.stage.model_config()
    cuda, capability = torch.device("cuda"), (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    odd = sizes.model_copy(update={"head_dim": 20})

    def refuse(match: str, precision: str = "bf16", sizes: Any = sizes) -> None:
        with pytest.raises(ConfigError, match=match):
            attention.use_varlen("varlen", cuda, precision, sizes)
        assert not attention.use_varlen("auto", cuda, precision, sizes)

    for wanted, expected in (("auto", True), ("varlen", True), ("mask", False)):
        assert attention.use_varlen(wanted, cuda, "bf16", sizes) == expected  # type: ignore[arg-type]
    assert attention.use_varlen("auto", None, "bf16", sizes)  # planned for other GPUs
    assert not attention.use_varlen("auto", torch.device("cpu"), "bf16", sizes)
    refuse("needs bf16 or fp16, not fp32", precision="fp32")
    refuse("multiple of 8 and at most 256, not 20", sizes=odd)
    with monkeypatch.context() as patch:
        patch.setattr(attention, "varlen_attn", lambda query, is_causal: query)
        refuse(r"needs torch 2\.14 or newer")
    capability = (7, 5)
    refuse(r"compute capability 8\.0")


@pytest.mark.parametrize("stage", ["thinker", "vision_encoder"])
def test_cudnn_computes_no_attention_with_masks(
    stage: str, text_data: Path, media_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop on a CUDA device turns it off before it moves the model there."""
    config = thinker_config(text_data) if stage == "thinker" else stage_config(stage, media_data)
    session = prepare(Request(config, tmp_path, Path(), {}, "never"), discover({}))
    cuda_session = dataclasses.replace(session, device=torch.device("cuda"), precision="bf16")

    class StopError(Exception):
        pass

    def stop(*_: Any) -> None:
        raise StopError

    monkeypatch.setattr(Engine, "__init__", stop)
    assert torch.backends.cuda.cudnn_sdp_enabled()
    try:
        for opened, is_enabled in ((session, True), (cuda_session, stage != "thinker")):
            with pytest.raises(StopError):
                open_loop(opened)
            assert torch.backends.cuda.cudnn_sdp_enabled() == is_enabled
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
