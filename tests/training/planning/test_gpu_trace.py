"""The trace for a GPU, on the meta device: every stage, and what fused kernels keep."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from muomni.distributed.discovery import Ranks
from muomni.training import session as sessions
from muomni.training.planning import gpu_kernels
from muomni.training.planning.dry_run import Device, check_memory, preview, read_step
from muomni.training.planning.live_bytes import LiveBytes
from muomni.training.planning.step_trace import ACTIVATIONS, StepTrace, trace_step
from muomni.training.session import Request, Session, prepare
from tests.training.runs import thinker_config
from tests.training.stages.curves import stage_config
from tests.training.stages.sft.omni_runs import omni_run, write_root

PERCEPTION = ("audio_encoder", "vision_encoder", "codec")
EXPERTS = {"num_experts": 4, "num_experts_per_token": 2, "expert_intermediate_size": 32}
STAGES = (*PERCEPTION, "thinker", "talker", "sft")


@pytest.fixture(scope="module")
def omni_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("omni"))


@pytest.fixture
def open_on_gpu(
    monkeypatch: pytest.MonkeyPatch, text_data: Path, media_data: Path, omni_root: Path
) -> Any:
    """Opens the session of a stage as on a machine with a GPU, for which the meta device stands."""
    monkeypatch.setattr(sessions, "pick_device", lambda local_rank: torch.device("meta"))
    monkeypatch.setattr(sessions, "pick_precision", lambda wanted, device: "bf16")

    def open_session(name: str, changes: dict[str, Any] | None = None) -> Session:
        if name == "thinker":
            config, run = thinker_config(text_data, changes), Path()
        elif name in PERCEPTION:
            config, run = stage_config(name, media_data, changes or {}), Path()
        else:
            config, run = omni_run(name, omni_root, changes or {}), omni_root / "run"
        return prepare(Request(config, run, run, {}, "never"), Ranks(0, 0, 2))

    return open_session


@pytest.mark.parametrize("name", STAGES)
def test_a_dry_run_on_a_gpu_machine_previews_every_stage(name: str, open_on_gpu: Any) -> None:
    session = open_on_gpu(name)
    device = Device("cuda", 80 * 2**30, 64 * 2**30)
    seen = preview(session, device)
    check_memory(session, seen, device)
    num_trained = sum(p.requires_grad for p in seen.task.parameters())
    assert len(seen.trace.stretches) == 1 + num_trained
    on_cpu = trace_step(session.stage, seen.batches, "bf16", 2)
    assert 0.3 < seen.trace.flops / on_cpu.flops < 4
    assert seen.trace.stretches[0].live[ACTIVATIONS] > 0.3 * on_cpu.stretches[0].live[ACTIVATIONS]


def test_experts_are_traced_with_an_even_load(open_on_gpu: Any) -> None:
    session = open_on_gpu("thinker", {"model": {"moe": EXPERTS}})
    trace = trace_step(session.stage, read_step(session), "bf16", 2, "cuda")
    assert trace.stretches[0].live[ACTIVATIONS] > 0
    counts = gpu_kernels.even_counts(11, 4)
    assert counts.tolist() == [3, 3, 3, 2]


def test_recomputation_is_traced_for_gpus_too(open_on_gpu: Any) -> None:
    traces: list[StepTrace] = []
    for policy in ("none", "full"):
        session = open_on_gpu("thinker", {"training": {"activation_checkpointing": policy}})
        traces.append(trace_step(session.stage, read_step(session), "bf16", 2, "cuda"))
    kept, recomputed = (trace.stretches[0].live[ACTIVATIONS] for trace in traces)
    assert recomputed < 0.7 * kept


def _live_after_attention(mask: torch.Tensor | None, num_layers: int = 3) -> int:
    """Bytes that attention layers keep for the backward pass, besides their inputs."""
    query = torch.empty(2, 4, 40, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    live = LiveBytes(lambda: "all", on_meta=True)
    live.exclude([query, *([] if mask is None else [mask])])
    with gpu_kernels.stand_ins(), live:
        mixed = [
            F.scaled_dot_product_attention(query, query, query, attn_mask=mask)
            for _ in range(num_layers)
        ]
        kept = sum(live.now.values())
        torch.stack(mixed).sum().backward()
    assert query.grad is not None
    return kept


def test_a_boolean_mask_is_kept_as_a_bias_of_each_layer_and_a_bias_once() -> None:
    output, log_sums = 2 * 4 * 40 * 8 * 2, 2 * 4 * 40 * 4
    plain = _live_after_attention(None)
    assert plain == 3 * (output + log_sums)
    by_mask = _live_after_attention(torch.empty(2, 1, 40, 40, dtype=torch.bool, device="meta"))
    assert by_mask - plain == 3 * 2 * 40 * 48 * 2  # rows are padded to 16 elements
    bias = torch.empty(2, 1, 40, 48, dtype=torch.bfloat16, device="meta")[..., :48]
    query = torch.empty(2, 4, 48, 8, dtype=torch.bfloat16, device="meta")
    live = LiveBytes(lambda: "all", on_meta=True)
    live.exclude([query, bias])
    with gpu_kernels.stand_ins(), live:
        out = F.scaled_dot_product_attention(query, query, query, attn_mask=bias)
    assert sum(live.peak.values()) == out.nbytes + 2 * 4 * 48 * 4


def test_the_backward_pass_has_fp32_query_gradients_and_one_key_gradient_per_query_head() -> None:
    query = torch.empty(2, 4, 32, 8, device="meta", requires_grad=True)
    key = torch.empty(2, 1, 32, 8, device="meta", requires_grad=True)
    live = LiveBytes(lambda: "all", on_meta=True)
    live.exclude([query, key])
    with gpu_kernels.stand_ins(), live:
        mixed = F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
        gradient = torch.empty_like(mixed)
        live.start_peak()
        before = sum(live.now.values())
        mixed.backward(gradient)
    grads = query.nbytes + 2 * key.nbytes
    buffers = query.nbytes + query.nbytes // 8 + 2 * 4 * key.nbytes
    assert sum(live.peak.values()) - before == grads + buffers
