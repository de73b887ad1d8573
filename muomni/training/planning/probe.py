"""Find the largest micro-batch whose training step fits into the memory of a device.

Every candidate runs a real optimizer step of two micro-batches, with the largest samples of the corpus. Sizes
double until one does not fit, and are then bisected.
"""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from muomni.config.run import DurationBatch, PackedBatch, RunConfig
from muomni.data.loading.loader import PlannedDataset, to_device
from muomni.data.sampling.plan import MicroBatch, Plan
from muomni.errors import ConfigError
from muomni.training.loop import Loop
from muomni.training.planning.live_bytes import LiveBytes
from muomni.training.session import Session, open_loop

# Steps among which the largest batch is chosen, since conversations vary in images and speech.
_NUM_STEPS_COMPARED = 4
_FRAMES_PER_S = 100


@dataclass(frozen=True, slots=True)
class Trial:
    """A tried micro-batch: `size` samples or sequences of at most `length` units; peak memory in bytes.

    `peak` is None if the device ran out of memory.
    """

    length: int
    size: int
    peak: int | None


@dataclass(frozen=True, slots=True)
class Probed:
    """The value of the config key that fits, and all trials."""

    key: str
    value: int
    trials: tuple[Trial, ...]


def probe(session: Session, max_bytes: int) -> Probed:
    """Find the largest micro-batch of the session's config that trains within `max_bytes` on this rank.

    The result is at most the global batch. For stages that batch by duration, it holds for the shortest, a
    medium, and the longest length. Raises ConfigError if not even one sequence or sample fits.
    """
    is_cuda = session.device.type == "cuda"
    live = LiveBytes(lambda: "all") if not is_cuda else nullcontext()
    with live as counted:
        loop = open_loop(session)
        loop.engine.train()
        trials: list[Trial] = []

        def fits(length: int, size: int, batch: MicroBatch) -> bool:
            peak = _peak(loop, session, batch, counted)
            trials.append(Trial(length, size, peak))
            return peak is not None and peak <= max_bytes

        key, value = _search(session.request.config, session.planned.plan, fits)
        loop.engine.deepspeed.destroy()
    return Probed(key, value, tuple(trials))


def largest_fitting(fits: Callable[[int], bool], limit: int) -> int:
    """The largest size from 1 to `limit` that fits, if all smaller ones do; 0 if none does."""
    good, bad = 0, limit + 1
    size = 1
    while size < bad:
        if not fits(size):
            bad = size
            break
        good, size = size, min(2 * size, limit) if size < limit else bad
    while bad - good > max(1, good // 16):  # finer steps are below the noise of allocators
        size = (good + bad) // 2
        good, bad = (size, bad) if fits(size) else (good, size)
    return good


def _search(
    config: RunConfig, plan: Plan, fits: Callable[[int, int, MicroBatch], bool]
) -> tuple[str, int]:
    """The config key of the micro-batch and its largest value."""
    section = config.batch
    if isinstance(section, DurationBatch):
        ids = plan.order.sample_ids()[: plan.batching.shuffle_window]
        lengths = plan.lengths[ids]
        budgets = []
        for length in sorted({int(q) for q in np.quantile(lengths, [0, 0.5, 1], method="higher")}):
            nearest = ids[np.argsort(np.abs(lengths - length), kind="stable")]
            limit = max(1, plan.batching.global_size // length)
            size = largest_fitting(
                lambda n, nearest=nearest, length=length: fits(length, n, _singles(nearest, n)),
                limit,
            )
            if size == 0:
                _reject("batch.micro_seconds", f"one sample of {length / _FRAMES_PER_S:.1f} s")
            # At the limit, the global batch bounds it, not the memory.
            budgets.append(plan.batching.global_size if size == limit else size * length)
        return "micro_seconds", max(min(budgets), int(lengths.max())) // _FRAMES_PER_S
    units = _units(plan)
    key, length = (
        ("micro_sequences", section.seq_len)
        if isinstance(section, PackedBatch)
        else ("micro_samples", 1)
    )
    size = largest_fitting(lambda n: fits(length, n, _first(units, n)), len(units.sequences))
    if size == 0:
        _reject(f"batch.{key}", "one sequence" if key == "micro_sequences" else "one sample")
    return key, size


def _units(plan: Plan) -> MicroBatch:
    """The global batch with the most samples among the first steps."""
    steps = [plan.rank_step(step, 0, 1) for step in range(_NUM_STEPS_COMPARED)]
    batches = max(steps, key=lambda step: sum(len(batch.ids) for batch in step))
    sequences = itertools.chain(*(batch.sequences for batch in batches))
    epochs = itertools.chain(*(batch.epochs or () for batch in batches))
    pairs = [pair for pair in zip(sequences, epochs, strict=True) if pair[0]]
    pairs.sort(key=lambda pair: len(pair[0]), reverse=True)
    return MicroBatch(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))


def _first(units: MicroBatch, num: int) -> MicroBatch:
    assert units.epochs is not None
    return MicroBatch(units.sequences[:num], units.epochs[:num])


def _singles(ids: np.ndarray, num: int) -> MicroBatch:
    """A micro-batch of `num` of the samples, repeated if there are fewer."""
    chosen = tuple((int(index),) for index in np.resize(ids, num))
    return MicroBatch(chosen, ((0,),) * num)


def _peak(loop: Loop, session: Session, planned: MicroBatch, live: LiveBytes | None) -> int | None:
    """Peak bytes of a step of two such micro-batches; None if the device ran out of memory."""
    stage, engine, device = session.stage, loop.engine, session.device
    dataset = PlannedDataset(session.planned.source, stage.view(), session.request.config.seed)
    host = dataset[planned].tensors
    if live is not None:
        live.start_peak()
    else:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.no_grad():
            batches = [stage.prepare(to_device(host, device)) for _ in range(2)]
        denominators = stage.loss_denominators(batches[0])
        for number, batch in enumerate(stage.begin_step(engine.forward, batches)):
            output = engine.forward(batch)
            engine.backward(output, denominators, stage.loss_weights(), is_last=number == 1)
            engine.end_micro_step(0.0)  # a learning rate of 0: the weights stay as they are
    except torch.OutOfMemoryError:
        engine.deepspeed.zero_grad()
        return None
    if live is not None:
        return sum(live.peak.values())
    return torch.cuda.max_memory_allocated(device)


def _reject(key: str, what: str) -> None:
    raise ConfigError(
        f"not even {what} fits into the memory, so no {key} does; use a smaller model or shorter samples, "
        f"set training.activation_checkpointing, or choose a --deepspeed_config that shards or offloads more"
    )
