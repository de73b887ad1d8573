"""What a run's speed is made of: FLOPs, utilization of the devices, the parts of a step, traces of it.

The loop says where a step's parts begin and counts batches here; metrics are made at logging steps only.
"""

from pathlib import Path

import torch

from muomni.data.loading.loader import CountedBatches
from muomni.data.views.base import Batch
from muomni.distributed import collectives
from muomni.observe.peak_flops import find_peak
from muomni.observe.profiler import Profiler
from muomni.observe.progress import Progress
from muomni.observe.step_clock import StepClock, step_breakdown
from muomni.observe.utilization import Utilization
from muomni.training.engine.engine import Engine
from muomni.training.flops import StepFlops
from muomni.training.stage import Stage


class Throughput:
    """Watches the training of `stage`, whose run folder is `root`."""

    def __init__(self, stage: Stage, engine: Engine, root: Path, device: torch.device) -> None:
        num_ranks, config = collectives.world_size(), stage.config
        self._device = device
        with torch.device("meta"):  # the engine may have sharded the weights of its task
            task = stage.build()
        stage.set_up(task)
        self._count_flops = stage.flop_counter(task)
        self._flops = StepFlops()
        self.clock = StepClock(device)
        engine.time_reductions(self.clock)
        self.profiler = Profiler(config.profile, root, device, collectives.rank(), self.clock)
        peak = find_peak(device, engine.precision, config.training.peak_tflops)
        self.utilization = Utilization(num_ranks, *peak)

    def count(self, batch: Batch) -> None:
        """Count the FLOPs of a batch that is about to run and still lies on the host."""
        self._flops += self._count_flops(batch)

    def take(
        self, step: int, units: torch.Tensor, loader: CountedBatches, progress: Progress
    ) -> tuple[float, float, dict[str, float]]:
        """`units` and bad samples of all ranks, and the metrics of the steps since the last call.

        Every rank must call it; requests to profile travel in the same reduction.
        """
        own = [loader.num_bad, self._flops.model, self._flops.hardware]
        own += self.profiler.take_requests()
        table = torch.tensor([0.0, *own], dtype=torch.float64, device=self._device)
        table[0] += units
        self._flops = StepFlops()
        sums: list[float] = collectives.sum_over_ranks(table).tolist()
        total_units, num_bad, model, hardware, wants_trace, wants_memory = sums
        metrics = progress.rates(step, total_units, loader.wait_s)
        num_steps, busy_s = progress.num_busy_steps, progress.busy_s
        metrics |= self.utilization.take(step, num_steps, model, hardware, busy_s)
        metrics |= step_breakdown(self.clock.take(), num_steps)
        self.profiler.request(wants_trace > 0, wants_memory > 0, step)
        return total_units, num_bad, metrics
