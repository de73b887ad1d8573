"""What the engine adds to a step: no wait for the device, few values read from it, and sums in fp32."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from muomni.config.run import RunConfig
from muomni.distributed.discovery import discover
from muomni.training.engine.precision import DTYPES
from muomni.training.session import Request, Session, open_loop, prepare, seed_everything
from tests.ranks import RankPool
from tests.training.runs import thinker_config

_READS = ("aten._local_scalar_dense.default", "aten.nonzero.default", "aten.bincount.default")


class _Reads(TorchDispatchMode):
    """Counts operators that copy a value from the device to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func) in _READS
        return func(*args, **(kwargs or {}))


def _session(config: RunConfig, run: Path, stage: int) -> Session:
    engine_json = {"zero_optimization": {"stage": stage}}
    return prepare(Request(config, run, run, engine_json, "never"), discover())


def _count_waits(config: RunConfig, run: Path, stage: int) -> dict[str, int]:
    """Calls of `synchronize` and values read by the engine in the third and later steps."""
    from deepspeed.accelerator import get_accelerator

    loop = open_loop(_session(config, run, stage))
    waits: Counter[str] = Counter()
    accelerator: Any = type(get_accelerator())
    synchronize = accelerator.synchronize

    def counted(*args: Any, **kwargs: Any) -> Any:
        waits["synchronize"] += 1
        return synchronize(*args, **kwargs)

    accelerator.synchronize = counted
    try:
        for _ in range(5):
            loop.train_step()
        batches = [loop._prepare(read.batch) for read in loop.parts.feed.read(5)]
        totals = [loop.stage.loss_denominators(batch) for batch in batches]
        denominators = {"loss": torch.stack([total["loss"] for total in totals]).sum()}
        outputs = [loop.engine.forward(batch) for batch in batches[:1]]
        with _Reads() as reads:  # the forward pass of a CPU takes other branches
            loop.engine.backward(outputs[0], denominators, {"loss": 1.0})
            loop.engine.end_micro_step(1.0)
    finally:
        accelerator.synchronize = synchronize
        loop.engine.deepspeed.destroy()
    return {**waits, "reads": reads.count}


@pytest.mark.parametrize(
    ("stage", "precision", "most"),
    [
        (0, "fp32", 0),
        (0, "bf16", 0),
        (0, "fp16", 1),
        (1, "bf16", 2),
        (1, "fp16", 4),
        (2, "bf16", 4),
    ],
)
def test_the_engine_waits_for_the_device_at_most_a_few_times_a_step(
    stage: int, precision: str, most: int, text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    changes = {"precision": precision, "batch": {"global_tokens": 64}}
    config = thinker_config(text_data, changes)
    (waits,) = one_rank.run(_count_waits, config=config, run=tmp_path, stage=stage)
    assert waits.get("synchronize", 0) == 0
    assert waits["reads"] <= most


def _first_norms(config: RunConfig, run: Path, stage: int) -> tuple[float, float]:
    """The gradient norm of the first step, and that of the fp32 sum of the same micro-batch gradients."""
    session = _session(config, run, stage)
    loop = open_loop(session)
    try:
        loop.train_step()
        found = loop.engine.grad_norm
    finally:
        loop.engine.deepspeed.destroy()
    seed_everything(config.seed)
    task = session.stage.build().to(DTYPES[config.precision])
    batches = [read.batch for read in session.feed.read(0)]
    denominator = sum(session.stage.loss_denominators(batch)["loss"] for batch in batches)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        (task(batch).losses["loss"] / denominator).backward()
        for name, parameter in task.named_parameters():
            assert parameter.grad is not None
            sums[name] = sums.get(name, 0) + parameter.grad.float()
            parameter.grad = None
    return found, float(torch.nn.utils.get_total_norm(list(sums.values())))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_gradients_are_added_up_in_fp32(
    stage: int, text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    config = thinker_config(text_data, {"precision": "bf16", "batch": {"global_tokens": 16 * 64}})
    ((found, expected),) = one_rank.run(_first_norms, config=config, run=tmp_path, stage=stage)
    assert found == pytest.approx(expected, rel=1e-5)  # sums in bf16 deviate by 1.4e-4
