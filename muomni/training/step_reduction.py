"""One reduction per step over all ranks: loss denominators, the stop flag, and counts of what was bad."""

import torch
import torch.distributed as dist

from muomni.data.views.base import Batch
from muomni.distributed import collectives
from muomni.training.outputs import Sums
from muomni.training.stage import Stage

_NUM_FLAGS = 4


class StepReduction:
    """Sums the loss denominators of a step over its micro-batches and all ranks.

    The reduction overlaps the first forward pass, since only the backward pass needs the sum. The stop flag
    and counts travel in the same tensor. They are read from an asynchronous copy after the
    step, so the host does not wait for the device; all ranks read the same values at the same step.
    """

    def __init__(self, stage: Stage, device: torch.device) -> None:
        self.stage = stage
        self.device = device
        self._packed = torch.zeros(0)
        self._work: dist.Work | None = None
        self._denominators: Sums | None = None
        self._flags: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def start(
        self,
        micro_batches: list[Batch],
        wants_stop: bool,
        num_bad_steps: int | torch.Tensor = 0,
        num_samples: int = 1,
        num_bad_samples: int = 0,
    ) -> None:
        """Begin the reduction of a step; every rank must call it, then `denominators`.

        `num_bad_steps` counts consecutive bad steps before this one, equal on all ranks. `num_samples` counts
        this rank's samples in the step, including `num_bad_samples` that were dropped.
        """
        local = [self.stage.loss_denominators(batch) for batch in micro_batches]
        values = [
            torch.stack([counts[term] for counts in local]).sum() for term in self.stage.terms
        ]
        flags = (wants_stop, num_bad_steps, num_samples, num_bad_samples)
        values += [torch.as_tensor(flag) for flag in flags]
        on_device = [value.to(self.device, non_blocking=True).float() for value in values]
        self._packed = torch.stack(on_device)
        self._work = collectives.start_sum_over_ranks(self._packed)
        self._denominators = None

    def denominators(self) -> Sums:
        """Global denominator of each loss term (0-d tensors on the device) of the step in progress.

        Without a usable sample on any rank, they are NaN: so are the gradients then, and the engine skips the
        step on all ranks, without a host that waits for the device.
        """
        if self._denominators is None:
            if self._work is not None:
                self._work.wait()
            flags = self._packed[-_NUM_FLAGS:]
            self._copy_flags(flags)
            is_empty = flags[2] <= flags[3]
            sums = self._packed[:-_NUM_FLAGS].masked_fill(is_empty, float("nan"))
            self._denominators = dict(zip(self.stage.terms, sums, strict=True))
        return self._denominators

    def _copy_flags(self, flags: torch.Tensor) -> None:
        if self.device.type == "cuda":
            self._flags = torch.empty(flags.shape, pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._flags = flags

    def stop_agreed(self) -> bool:
        """Whether any rank wanted to stop at the start of the last step."""
        return self._flag(0) > 0

    def num_bad_steps(self) -> int:
        """The number of consecutive bad steps before the last step."""
        return round(self._flag(1) / collectives.world_size())

    def num_samples(self) -> tuple[int, int]:
        """Samples of the last step over all ranks, including dropped ones, and the dropped ones."""
        return round(self._flag(2)), round(self._flag(3))

    def _flag(self, index: int) -> float:
        if self._flags is None:
            return 0.0
        if self._copied is not None:
            self._copied.synchronize()  # the copy was queued before the backward pass
        return float(self._flags[index])


class RunningSums:
    """Sums [sum, denominator] pairs on the device, and divides only when metrics are logged.

    Pairs of vectors, [2, n], yield metrics `name.0` to `name.n-1`.
    """

    def __init__(self) -> None:
        self._sums: Sums = {}

    def add(self, logs: Sums) -> None:
        for name, pair in logs.items():
            self._sums[name] = self._sums[name] + pair if name in self._sums else pair.clone()

    def take(self) -> dict[str, float]:
        """Ratios over all ranks since the last call; every rank must call it."""
        if not self._sums:
            return {}
        columns: list[str] = []
        for name, pair in sorted(self._sums.items()):
            indices = range(pair.shape[1]) if pair.ndim == 2 else ()
            columns += [f"{name}.{index}" for index in indices] or [name]
        table = torch.cat([self._sums[name].double().view(2, -1) for name in sorted(self._sums)], 1)
        self._sums = {}
        totals, denominators = collectives.sum_over_ranks(table).tolist()
        return {
            name: (total / denominator if denominator else float("nan"))
            for name, total, denominator in zip(columns, totals, denominators, strict=True)
        }
