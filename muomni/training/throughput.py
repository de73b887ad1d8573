"""Speed of a run: rates, FLOPs, device utilization, step breakdown, and traces.

The loop marks sections of a step and counts batches here; metrics are computed at logging steps only.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from muomni.data.loading.loader import CountedBatches
from muomni.data.views.base import Batch
from muomni.distributed import collectives
from muomni.observe.peak_flops import find_peak
from muomni.observe.profiler import Profiler
from muomni.observe.progress import StepRates
from muomni.observe.step_clock import StepClock, step_breakdown
from muomni.observe.utilization import Utilization
from muomni.training.engine.engine import Engine
from muomni.training.flops import StepFlops
from muomni.training.stage import Stage


class Measured(NamedTuple):
    """Sums over all ranks, and metrics, of the steps since the last call of `take`."""

    units: float
    metrics: dict[str, float]


class Throughput:
    """Measures the training of `stage` after `step` finished steps; `root` is its run folder."""

    def __init__(
        self, stage: Stage, engine: Engine, root: Path, device: torch.device, step: int
    ) -> None:
        num_ranks, config = collectives.world_size(), stage.config
        self._device = device
        with torch.device("meta"):  # the engine may have sharded the weights of its task
            task = stage.build()
        stage.set_up(task)
        self._count_flops = stage.flop_counter(task)
        self._flops = StepFlops()
        self._units = torch.zeros((), device=device)
        self._rates = StepRates(stage.view().unit, step)
        self.clock = StepClock(device)
        engine.time_reductions(self.clock)
        self.profiler = Profiler(config.profile, root, device, collectives.rank(), self.clock)
        peak = find_peak(device, engine.precision, config.training.peak_tflops)
        self.utilization = Utilization(num_ranks, *peak)

    def start(self, step: int) -> None:
        """Measure rates from now on, after `step` finished steps."""
        self._rates.start(step)

    @contextmanager
    def paused(self, section: str) -> Iterator[None]:
        """Run the block as `section` of the step clock, and exclude it from the rates."""
        start = time.perf_counter()
        with self.clock.section(section):
            yield
        self._rates.pause(time.perf_counter() - start)

    def count_flops(self, batch: Batch) -> None:
        """Count the FLOPs of a batch that is about to run and is still on the host."""
        self._flops += self._count_flops(batch)

    def count_units(self, batch: Batch) -> None:
        """Count the units of a batch on the device."""
        self._units += batch["units"]

    def units_since_log(self) -> float:
        """The units of all ranks since the last call of `take`; every rank must call it."""
        return float(collectives.sum_over_ranks(self._units.to(torch.float64, copy=True)))

    def take(self, step: int, loader: CountedBatches, datasets: Sequence[str] = ()) -> Measured:
        """Return the measurements since the last call; every rank must call it.

        Requests for profiles, and the samples of each of several `datasets` are summed in the same reduction.
        """
        own = [self._flops.model, self._flops.hardware]
        own += self.profiler.take_requests()
        own += loader.take_num_of_dataset(len(datasets)) if len(datasets) > 1 else []
        table = torch.tensor([0.0, *own], dtype=torch.float64, device=self._device)
        table[0] += self._units
        self._flops, self._units = StepFlops(), torch.zeros_like(self._units)
        sums: list[float] = collectives.sum_over_ranks(table).tolist()
        units, model, hardware, wants_trace, wants_memory, *num_of_dataset = sums
        metrics = self._rates.take(step, units, loader.wait_s)
        num_steps, busy_s = self._rates.num_busy_steps, self._rates.busy_s
        metrics |= self.utilization.take(step, num_steps, model, hardware, busy_s)
        metrics |= step_breakdown(self.clock.take(), num_steps)
        metrics |= realized_mix(datasets, num_of_dataset)
        self.profiler.request(wants_trace > 0, wants_memory > 0, step)
        return Measured(units, metrics)


def realized_mix(datasets: Sequence[str], num_samples: Sequence[float]) -> dict[str, float]:
    """The fraction of samples from each dataset, as `data/NAME_fraction`; datasets of one name are one."""
    metrics: dict[str, float] = {}
    # Samples of a single dataset are not counted.
    for name, num in zip(datasets, num_samples, strict=False):
        key = f"data/{name}_fraction"
        metrics[key] = metrics.get(key, 0.0) + num / max(1.0, sum(num_samples))
    return metrics
