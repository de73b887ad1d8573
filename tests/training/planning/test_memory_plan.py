"""Memory plans: against manual calculations for small sizes, and against the tensors of real ranks."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.config.run import RunConfig
from muomni.distributed.discovery import Ranks, discover
from muomni.training.engine.ds_config import ZeroSettings
from muomni.training.engine.offload import Offload
from muomni.training.planning.dry_run import Device, predict_memory, read_step
from muomni.training.planning.gradient_layout import Setup, Sizes
from muomni.training.planning.live_bytes import LiveBytes
from muomni.training.planning.memory_plan import MemoryPlan, predict
from muomni.training.planning.step_trace import (
    ACTIVATIONS,
    WORKSPACE,
    StepTrace,
    Stretch,
    trace_step,
)
from muomni.training.session import Request, open_loop, prepare
from tests.ranks import RankPool
from tests.training.runs import thinker_config

# Parameters in model order: 60, 40, and 30 elements, the second in its own group.
SIZES = Sizes(
    groups=((60, 30), (40,)), num_moments=(2, 2), order=(0, 2, 1), frozen=(500,), buffer_bytes=8
)
# Gradients finish from the last parameter to the first, while 1,000 bytes of activations are freed.
TRACE = StepTrace(
    stretches=(
        Stretch({ACTIVATIONS: 1000}, 2),
        Stretch({ACTIVATIONS: 700, WORKSPACE: 160}, 1),
        Stretch({ACTIVATIONS: 400, WORKSPACE: 240}, 0),
        Stretch({}, None),
    ),
    before={ACTIVATIONS: 50},
    resident=7,
    flops=1,
)

NOTHING, OPTIMIZER = Offload(), Offload(optimizer=True)
ALL = Offload(optimizer=True, parameters=True)


def plan(
    stage: int, *, num_ranks: int = 2, width: int = 4, accumulation: int = 1, average: bool = False,
    bucket: int = 1000, on_gpu: bool = True, offload: Offload = NOTHING,
    prefetch: int = 0, small: int = 0, reuse: int = 10**9, sums: int | None = None,
) -> MemoryPlan:  # fmt: skip
    zero = ZeroSettings(stage, True, bucket, prefetch, small, reuse, 10**9, offload)
    sums = sums or (4 if stage == 0 else width)  # without ZeRO, gradients are always fp32
    setup = Setup(num_ranks, accumulation > 1, width, sums, sums, average, on_gpu)
    return predict(zero, SIZES, TRACE, setup)


def test_without_zero_every_rank_has_all_state() -> None:
    found = plan(0)
    assert found.parts["parameters"] == 4 * (130 + 500) + 8
    assert found.parts["gradients"] == 4 * 130
    assert found.parts["fp32_weights"] == 0  # the weights are fp32 themselves
    assert found.parts["moments"] == 8 * 130
    assert found.parts["average"] == 0
    assert found.parts["activations"] == 1000 + 7
    # Finished gradients add up while activations are freed: two precede the last one.
    passes = found.moments["forward and backward"]
    assert sum(passes.values()) - 4 * 630 - 8 - 8 * 130 - 7 == max(1000, 860 + 120, 640 + 280)
    # All gradients are reduced in one copy.
    assert found.moments["update"]["buckets"] == 4 * 130


def test_accumulated_gradients_exist_from_the_start() -> None:
    first, later = plan(0), plan(0, accumulation=2)
    assert first.moments["forward and backward"]["gradients"] == 0
    assert later.moments["forward and backward"]["gradients"] == 4 * 130


def test_16_bit_weights_have_fp32_master_weights() -> None:
    found = plan(0, width=2, average=True)
    assert found.parts["parameters"] == 4 * 630 + 8  # fp32 when built, then half
    assert found.moments["update"]["parameters"] == 2 * 630 + 8
    assert found.parts["fp32_weights"] == found.parts["average"] == 4 * 130
    assert found.moments["update"]["gradients"] == 4 * 130


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_optimizer_state_is_sharded_and_frozen_weights_have_none(stage: int) -> None:
    one, four = (plan(stage, num_ranks=n, average=True).parts for n in (1, 4))
    for part, width in (("fp32_weights", 4), ("average", 4), ("moments", 8)):
        assert one[part] == width * 130
        # 90 and 40 elements in four equal shares: 23 or 24, padded to even ones under ZeRO 1 and 2.
        assert four[part] == width * (24 + 10 if stage < 3 else 15 + 8 + 10)
    weights = plan(stage, num_ranks=4).moments["before forward"]["parameters"] - 8
    assert weights == 4 * ((96 + 40 + 500) if stage < 3 else (15 + 8 + 10 + 125))


def test_gradients_of_other_ranks_are_freed_with_their_bucket() -> None:
    # Shards of group one: 45 of 90, so its first parameter is in both, as is that of the other group.
    all_of_them = plan(1, accumulation=2, bucket=1000).moments["forward and backward"]["gradients"]
    assert all_of_them == 4 * 130
    kept = plan(2, accumulation=2, bucket=1000).moments["forward and backward"]["gradients"]
    assert kept == 4 * (60 + 30 + 40)  # parameters that overlap the larger shard
    sharded = plan(3, accumulation=2, bucket=1000).moments["forward and backward"]["gradients"]
    assert sharded == 4 * (30 + 15 + 20)


def test_reserved_buckets_count_on_gpus_and_written_ones_on_cpus() -> None:
    assert plan(1).parts["buckets"] >= 2 * 4 * 1000
    assert plan(1, on_gpu=False).parts["buckets"] <= 2 * 4 * 130


def test_gathered_weights_are_released_in_the_backward_pass() -> None:
    passes = plan(3, num_ranks=4).moments["forward and backward"]
    assert passes["parameters"] == 4 * (15 + 8 + 10 + 125) + 4 * 630 + 8


def test_small_weights_are_replicated_and_large_ones_gathered_up_to_a_limit() -> None:
    shares = 15 + 8 + 10 + 125
    found = plan(3, num_ranks=4, small=45)  # those of 30 and 40 elements
    assert found.moments["before forward"]["parameters"] == 4 * (shares + 70) + 8
    assert found.moments["forward and backward"]["parameters"] == 4 * (shares + 70 + 560) + 8
    # Weights reused soon, prefetched weights, and the largest one.
    found = plan(3, num_ranks=4, reuse=10, prefetch=20)
    assert found.moments["forward and backward"]["parameters"] == 4 * (shares + 10 + 20 + 500) + 8


def test_with_small_shards_the_norm_needs_more_than_the_update() -> None:
    assert plan(1, num_ranks=4).moments["update"]["buckets"] == 8 * 60  # the largest one in fp64


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("width", [2, 4])
def test_an_offloaded_optimizer_keeps_weights_and_buckets_on_the_gpu(
    stage: int, width: int
) -> None:
    found = plan(stage, width=width, average=True, bucket=1000, offload=OPTIMIZER)
    there = plan(stage, width=width, average=True, bucket=1000)
    for part in ("fp32_weights", "moments", "average"):
        assert found.parts[part] == 0
        assert found.host[part] == there.parts[part] > 0
    assert found.moments["update"]["gradients"] == 0
    kept = found.moments["before forward"]["parameters"]
    assert kept == there.moments["before forward"]["parameters"]
    assert found.peak < there.peak
    assert there.host == {} and there.host_peak == 0


def test_the_host_also_has_gradients_and_16_bit_weights() -> None:
    # Two ranks, bf16: shards of 46 (of 92 with padding) and 20 elements.
    found = plan(2, width=2, offload=OPTIMIZER)
    assert found.host["fp32_weights"] == found.host["gradients"] == 4 * (46 + 20)
    assert found.host["moments"] == 8 * (46 + 20)
    assert found.host["parameters"] == 2 * (46 + 20)  # to copy back
    assert found.host["buckets"] == 2 * 60  # the largest parameter, on the GPU and on the host
    assert found.moments["before forward"]["buckets"] == 2 * 60
    assert found.host_peak == (4 + 4 + 8 + 2) * 66 + 120
    # Accumulated gradients are full parameters that overlap the larger shard.
    split = plan(2, width=2, accumulation=2, offload=OPTIMIZER)
    assert split.host["gradients"] == 4 * 66 + 2 * (60 + 30 + 40)
    assert split.moments["forward and backward"]["gradients"] == 0
    # Under ZeRO 1 they stay on the GPU.
    waiting = plan(1, width=2, accumulation=2, offload=OPTIMIZER)
    assert waiting.host["gradients"] == 4 * 66
    assert waiting.moments["forward and backward"]["gradients"] == 2 * 130


def test_offloaded_weights_are_on_the_gpu_during_use() -> None:
    found = plan(3, num_ranks=4, width=2, offload=ALL)
    assert found.moments["update"]["parameters"] == 8  # buffers
    assert found.moments["forward and backward"]["parameters"] == 2 * 630 + 8
    share = 15 + 8 + 10
    # Shards of frozen weights have their own buffers; those of trained weights are always page-locked.
    assert found.host["parameters"] == 64 + 32 + 2 * 125  # 2 * (15 + 8) and 2 * 10 bytes
    assert found.host["gradients"] == (4 + 2) * share
    assert found.host["fp32_weights"] == 4 * share
    # A single GPU also copies the weights in use; a CPU does not.
    alone = plan(3, num_ranks=1, width=2, offload=ALL).moments["forward and backward"]
    assert alone["parameters"] == 2 * 630 + 8
    on_cpu = plan(3, num_ranks=1, width=2, offload=ALL, on_gpu=False)
    assert on_cpu.moments["forward and backward"]["parameters"] == 8
    # Only weights are offloaded.
    weights = plan(3, num_ranks=4, width=2, offload=Offload(parameters=True))
    assert weights.host.keys() == {"parameters"}
    assert weights.parts["fp32_weights"] == 4 * share


def test_page_locked_buffers_of_gpus_are_powers_of_two() -> None:
    pinned = Offload(optimizer=True, has_pinned_optimizer=True)
    found = plan(2, width=2, offload=pinned)
    assert found.host["fp32_weights"] == 256 + 128  # 4 * 46 = 184 and 4 * 20 = 80 bytes
    assert found.host["moments"] == 8 * (46 + 20)  # not page-locked by torch's optimizer
    assert plan(2, width=2, offload=pinned, on_gpu=False).host["fp32_weights"] == 4 * 66
    locked = Offload(parameters=True, has_pinned_parameters=True)
    found = plan(3, num_ranks=4, width=2, offload=locked)
    # Each shard had its own buffer first (30, 16, and 20 bytes), and torch keeps that memory.
    assert found.host["parameters"] == (64 + 32) + 256 + (32 + 16 + 32)


# Small buckets, so that they fill up several times.
BUCKETS = {
    "overlap_comm": True, "reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000,
    "stage3_param_persistence_threshold": 100,
}  # fmt: skip
# Dominated by weights and gradients, or by activations.
RUNS: list[dict[str, Any]] = [
    {"precision": "fp32", "batch": {"global_tokens": 256, "micro_sequences": 1}},
    {
        "precision": "bf16",
        "batch": {"global_tokens": 1024, "micro_sequences": 8},
        "training": {"ema_decay": 0.9},
    },
]


def _request(config: RunConfig, run: Path, zero: int, offloads: tuple[str, ...] = ()) -> Request:
    section = {"stage": zero, **(BUCKETS if zero else {})}
    # Only GPUs need page-locked memory.
    section |= {f"offload_{part}": {"device": "cpu", "pin_memory": False} for part in offloads}
    return Request(config, run, run, {"zero_optimization": section}, "never")


def _measured_peak(config: RunConfig, run: Path, zero: int, offloads: tuple[str, ...] = ()) -> int:
    """Return the peak bytes of the tensors of this rank in the second of two steps."""
    session = prepare(_request(config, run, zero, offloads), discover())
    with LiveBytes(lambda: "all") as live:
        loop = open_loop(session)
        loop.engine.train()
        loop.train_step()
        live.start_peak()
        loop.train_step()
        peak = sum(live.peak.values())
    loop.engine.deepspeed.destroy()
    del loop
    gc.collect()
    return peak


def _planned(config: RunConfig, run: Path, zero: int, offloads: tuple[str, ...] = ()) -> MemoryPlan:
    """Return the prediction for one of two such ranks, as if they had a GPU."""
    session = prepare(_request(config, run, zero, offloads), Ranks(0, 0, 2))
    trace = trace_step(session.stage, read_step(session), session.precision, 2)
    with torch.device("meta"):
        task = session.stage.build()
    plans = predict_memory(session, task, trace, Device("cuda", None))
    (found,) = (p for p in plans if p.zero_stage == zero and bool(p.offload) == bool(offloads))
    return found


LAYOUTS: list[tuple[int, tuple[str, ...]]] = [
    (0, ()), (1, ()), (2, ()), (3, ()), (1, ("optimizer",)), (2, ("optimizer",)),
    (3, ("optimizer",)), (3, ("param",)), (3, ("optimizer", "param")),
]  # fmt: skip


@pytest.mark.parametrize(("zero", "offloads"), LAYOUTS, ids=str)
@pytest.mark.parametrize("changes", RUNS, ids=["fp32", "bf16"])
def test_the_plan_matches_the_tensors_of_real_ranks(
    changes: dict[str, Any],
    zero: int,
    offloads: tuple[str, ...],
    text_data: Path,
    tmp_path: Path,
    two_ranks: RankPool,
) -> None:
    """On a CPU, device and host tensors share memory."""
    options: dict[str, Any] = {
        "config": thinker_config(text_data, changes), "run": tmp_path, "zero": zero,
        "offloads": offloads,
    }  # fmt: skip
    measured = max(two_ranks.run(_measured_peak, **options))
    found = _planned(**options)
    assert found.step_peak + found.host_peak == pytest.approx(measured, rel=0.05)
