"""Held-out figures: each sample counts exactly once, on any number of ranks."""

import itertools

import torch

from muomni.data.loader import Loader, PlannedDataset, to_device
from muomni.data.plan import MicroBatch, cover
from muomni.data.source import Source
from muomni.dist import collectives
from muomni.training.engine import Engine
from muomni.training.stage import Stage
from muomni.training.window import RunningSums

_EMPTY = MicroBatch(rows=())


def validate_split(
    stage: Stage, engine: Engine, source: Source, device: torch.device, max_batches: int | None
) -> dict[str, float]:
    """Metrics of the stage over a split; every rank must call it.

    Ranks take the micro-batches in turn. Who runs out takes an empty one, which weighs nothing, so
    that all make the same number of forward passes (ZeRO-3 would wait for ever otherwise).
    """
    view = stage.view()
    batches = cover(view.lengths(source), stage.batching())[:max_batches]
    ranks = collectives.world_size()
    padded = batches + [_EMPTY] * (-len(batches) % ranks)
    loader = Loader(
        PlannedDataset(source, view, stage.config.seed),
        list(itertools.islice(padded, collectives.rank(), None, ranks)),
        max_bad_samples=stage.config.data.max_bad_samples,
    )
    sums = RunningSums()
    with engine.evaluation():
        for batch in loader:
            prepared = stage.prepare(to_device(batch, device))
            (prepared,) = stage.begin_step(engine.forward, [prepared])
            sums.add(engine.forward(prepared).logs)
    return stage.metrics(sums.take())
