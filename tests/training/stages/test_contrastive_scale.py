"""Contrastive losses over all ranks and micro-batches do not depend on how a step is divided."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from muomni.errors import CheckpointError
from muomni.training.stages.vision_encoder import VisionEncoderTask
from tests.parity.comparison import TOLERANCES, deviation
from tests.parity.reference import reference_curve
from tests.ranks import RankPool
from tests.training.runs import train
from tests.training.stages.contrastive_reference import (
    build_task,
    first_step,
    full_step,
    gradients_of,
    open_session,
    step_of_rank,
    textbook_loss,
)
from tests.training.stages.curves import stage_config

LOSSES = ("clip", "siglip")


@pytest.mark.parametrize("num_micro_batches", [2, 4])
@pytest.mark.parametrize("loss", LOSSES)
def test_two_ranks_have_the_loss_and_gradient_of_the_joined_batch(
    loss: str, num_micro_batches: int, media_data: Path, two_ranks: RankPool
) -> None:
    """With one and two micro-batches per rank; gradients include negatives of the other rank."""
    changes = {
        "batch": {"global_samples": 4 * num_micro_batches},
        "model": {"initial_temperature": 0.2},
        "options": {"loss": loss},
    }
    config = stage_config("vision_encoder", media_data, changes)
    expected, gradients = full_step(config)
    for total, found in two_ranks.run(step_of_rank, config=config):
        assert total == pytest.approx(expected, rel=1e-5)
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_small_micro_batches_learn_like_one_large_batch(
    loss: str, media_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    """Batch 8 with accumulation 4 and batch 32 with accumulation 1, on two ranks each, ZeRO-1."""
    curves = []
    for size in (8, 32):
        changes = {
            "batch": {"global_samples": 64, "micro_samples": size},
            "model": {"initial_temperature": 0.2},
            "optim": {"eps": 1e-4},
            "options": {"loss": loss},
            "training": {"max_steps": 5},
        }
        config = stage_config("vision_encoder", media_data, changes)
        curves.append(two_ranks.run(train, config=config, run=tmp_path / str(size))[0]["curve"])
    small, large = curves
    for name, tolerance in (("loss", 2e-5), ("grad_norm", 1e-3)):
        values, expected = ([line[name] for line in curve] for curve in (small, large))
        assert deviation(values, expected) < tolerance
        assert values[-1] != pytest.approx(values[0], rel=0.02)


@pytest.mark.parametrize(
    ("zero", "precision"),
    [("zero0", "fp16"), ("zero2", "fp16"), ("zero3", "fp32"), ("zero3", "bf16")],
)
def test_the_sigmoid_loss_learns_like_plain_pytorch_in_every_engine(
    zero: str, precision: str, media_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    """The cells of the parity matrix train InfoNCE; the test above trains under ZeRO-1."""
    changes: dict[str, Any] = {
        "precision": precision,
        "fp16": {"initial_scale_power": 8},
        # At ten times this rate, curves in bf16 diverge by more than the tolerance within these steps.
        "optim": {"lr": 3e-5, "eps": 1e-4},
        # With few pairs, the default initialization is far off, and a step changes the loss by a tenth.
        "model": {"initial_temperature": 0.2, "initial_bias": -3.0},
        "options": {"loss": "siglip"},
    }
    config = stage_config("vision_encoder", media_data, changes)
    result = two_ranks.run(train, config=config, run=tmp_path, zero=zero)[0]
    curve, task = reference_curve(config)
    limit = TOLERANCES[precision]
    assert deviation(result["losses"], curve.losses) < limit.loss
    norms = [line["grad_norm"] for line in result["curve"]]
    assert deviation(norms, curve.grad_norms) < limit.grad_norm
    assert result["curve"][0]["bias"] == -3
    assert isinstance(task, VisionEncoderTask) and task.clip.bias is not None
    assert task.clip.bias.item() != -3


def test_a_checkpoint_of_the_other_loss_is_rejected(
    media_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = stage_config("vision_encoder", media_data, {"training": {"max_steps": 1}})
    two_ranks.run(train, config=config, run=tmp_path)
    other = stage_config(
        "vision_encoder",
        media_data,
        {"training": {"max_steps": 2}, "options": {"loss": "siglip"}},
    )
    with pytest.raises(CheckpointError, match="step_00000001"):
        two_ranks.run(train, config=other, run=tmp_path)


class _Shapes(TorchDispatchMode):
    """Collects the shapes of all tensors that operators return, including backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.found.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("loss", LOSSES)
def test_no_rank_computes_the_full_similarity_matrix(loss: str, media_data: Path) -> None:
    changes = {"batch": {"global_samples": 28, "micro_samples": 7}, "options": {"loss": loss}}
    session = open_session(stage_config("vision_encoder", media_data, changes))
    task = build_task(session)
    with _Shapes() as shapes:
        for batch in session.stage.begin_step(task, first_step(session)):
            task(batch).losses["loss"].backward()
    assert (7, 28) in shapes.found
    assert not [shape for shape in shapes.found if shape.count(28) > 1]


@pytest.mark.parametrize("loss", LOSSES)
def test_both_passes_compute_the_same_features(loss: str, media_data: Path) -> None:
    """They draw no random numbers, whose state would differ; loss and gradients are the textbook's."""
    changes = {"model": {"initial_temperature": 0.2}, "options": {"loss": loss}}
    session = open_session(stage_config("vision_encoder", media_data, changes))
    stage, batches = session.stage, first_step(session)
    task = build_task(session)
    expected = textbook_loss(task, batches)
    expected.backward()
    gradients = gradients_of(task)
    task.zero_grad()
    seen: list[torch.Tensor] = []
    task.clip.vision_projection.register_forward_hook(lambda *args: seen.append(args[2].detach()))
    state, total = torch.get_rng_state(), 0.0
    for batch in stage.begin_step(task, batches):
        value = task(batch).losses["loss"] / 16
        value.backward()
        total += value.item()
    assert torch.equal(torch.get_rng_state(), state)
    assert len(seen) == 8 and not torch.equal(seen[0], seen[1])
    assert all(torch.equal(one, other) for one, other in zip(seen[:4], seen[4:], strict=True))
    assert total == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients_of(task).items():
        torch.testing.assert_close(gradient, gradients[name], atol=1e-5, rtol=1e-3)
