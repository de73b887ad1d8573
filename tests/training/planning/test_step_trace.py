"""A step traced with fake weights needs the same bytes as with real ones, in every stage."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.distributed.discovery import Ranks
from muomni.training.planning import step_trace
from muomni.training.planning.dry_run import read_step
from muomni.training.planning.step_trace import (
    ACTIVATIONS,
    LOGITS,
    FakeStep,
    StepTrace,
    trace_step,
    trace_task,
)
from muomni.training.session import Request, Session, prepare
from tests.training.stages.curves import stage_config
from tests.training.stages.sft.omni_runs import omni_run, write_root

RECOMPUTED = {"training": {"activation_checkpointing": True}}
PERCEPTION = ("audio_encoder", "vision_encoder", "codec")


@pytest.fixture(scope="module")
def omni_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("omni"))


def open_session(
    stage: str, media_data: Path, omni_root: Path, changes: dict[str, Any], num_ranks: int = 2
) -> Session:
    if stage in PERCEPTION:
        config, run = stage_config(stage, media_data, changes), Path()
    else:
        config, run = omni_run(stage, omni_root, changes), omni_root / "run"
    return prepare(Request(config, run, run, {}, "never"), Ranks(0, 0, num_ranks))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in (*PERCEPTION, "talker", "sft")),
        *((name, RECOMPUTED) for name in ("audio_encoder", "codec")),
        ("vision_encoder", {"training": {"activation_checkpointing": {"vision": 2}}}),
        ("sft", {"training": {"activation_checkpointing": {"thinker": "full", "audio*": 2}}}),
    ],
)
def test_fake_weights_need_the_bytes_of_real_ones(
    name: str, changes: dict[str, Any], media_data: Path, omni_root: Path
) -> None:
    session = open_session(name, media_data, omni_root, changes)
    batches = read_step(session)
    task = session.stage.build()
    session.stage.set_up(task)
    trace_step(session.stage, batches, "fp32", 2)  # creates cached windows and filters
    real = trace_task(session.stage, task.train(), batches, 2)
    fake = trace_step(session.stage, batches, "fp32", 2)
    assert len(fake.stretches) == 1 + sum(p.requires_grad for p in task.parameters())
    assert fake == real


def test_frozen_models_and_batches_are_resident(media_data: Path, omni_root: Path) -> None:
    session = open_session("talker", media_data, omni_root, {})
    batches = read_step(session)
    weights = [t for model in session.stage.frozen_models() for t in model.state_dict().values()]
    least = sum(t.nbytes for t in [*weights, *(t for b in batches for t in b.values())])
    assert least <= trace_step(session.stage, batches, "fp32", 2).resident < 2 * least


def peak(trace: StepTrace) -> int:
    return max(sum(stretch.live.values()) for stretch in trace.stretches)


@pytest.mark.parametrize("name", ["audio_encoder", "vision_encoder"])
def test_tensors_of_losses_are_counted_as_logits(
    name: str, media_data: Path, omni_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CTC log-probabilities, and similarities of a micro-batch with all pairs of a step."""
    allocated: Counter[str] = Counter()

    class Counting(FakeStep):
        def _watch(self, tensor: torch.Tensor, part: str, num_bytes: int) -> None:
            allocated[part] += num_bytes
            super()._watch(tensor, part, num_bytes)

    monkeypatch.setattr(step_trace, "FakeStep", Counting)
    session = open_session(name, media_data, omni_root, {})
    batches = read_step(session)
    trace_step(session.stage, batches, "fp32", 2)
    batch_size = len(next(iter(batches[0].values())))
    columns = (
        2 * len(batches) * batch_size
        if name == "vision_encoder"
        else session.stage.tokenizer.vocab_size
    )
    assert allocated[LOGITS] >= 4 * batch_size * columns


def test_features_of_all_ranks_need_memory(media_data: Path, omni_root: Path) -> None:
    peaks = []
    for num_ranks in (2, 4):
        session = open_session("vision_encoder", media_data, omni_root, {}, num_ranks)
        batches = read_step(session) * (num_ranks // 2)  # the same number of micro-batches per rank
        peaks.append(peak(trace_step(session.stage, batches, "fp32", num_ranks)))
    assert peaks[1] > peaks[0]


def test_recomputation_saves_memory_and_costs_flops(media_data: Path, omni_root: Path) -> None:
    sessions = [
        open_session("talker", media_data, omni_root, changes) for changes in ({}, RECOMPUTED)
    ]
    kept, recomputed = (trace_step(s.stage, read_step(s), "fp32", 2) for s in sessions)
    assert recomputed.stretches[0].live[ACTIVATIONS] < 0.7 * kept.stretches[0].live[ACTIVATIONS]
    assert peak(recomputed) < peak(kept)
    assert 1.05 * kept.flops < recomputed.flops < 4 / 3 * kept.flops


def test_recomputing_fewer_blocks_keeps_more_activations(media_data: Path, omni_root: Path) -> None:
    traces = []
    for policy in ("full", 2, 3, "none"):
        changes = {
            "model": {"num_layers": 6},
            "training": {"activation_checkpointing": policy},
        }
        session = open_session("talker", media_data, omni_root, changes)
        traces.append(trace_step(session.stage, read_step(session), "fp32", 2))
    kept = [trace.stretches[0].live[ACTIVATIONS] for trace in traces]
    assert kept == sorted(kept) and len(set(kept)) == 4
    flops = [trace.flops for trace in traces]
    assert flops == sorted(flops, reverse=True) and len(set(flops)) == 4
    # Recomputing half of the blocks costs half of recomputing all.
    assert flops[1] - flops[3] == (flops[0] - flops[3]) / 2
