"""One reduction a step: the weights of all ranks, and what may end the run on all of them."""

import torch
import torch.distributed as dist

from muomni.data.views.base import Batch
from muomni.distributed import collectives
from muomni.training.outputs import Sums
from muomni.training.stage import Stage


class StepReduction:
    """Sums the loss weights of an accumulation window over its micro-batches and all ranks.

    The sum travels while the first forward pass runs: only the backward pass needs it. The stop flag
    and the count of bad steps are in the same tensor. They are read one step late from an asynchronous
    copy, so the host never waits for the device; all ranks read the same values at the same step.
    """

    def __init__(self, stage: Stage, device: torch.device) -> None:
        self.stage = stage
        self.device = device
        self._control = torch.zeros(0)
        self._work: dist.Work | None = None
        self._weights: Sums | None = None
        self._flags: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def start(
        self, batches: list[Batch], wants_stop: bool, num_bad_steps: int | torch.Tensor = 0
    ) -> None:
        """Begin the reduction for the window `batches`; every rank must call it, then `weights`.

        `num_bad_steps` counts those in a row before this window, on each rank the same.
        """
        local = [self.stage.loss_denominators(batch) for batch in batches]
        values = [
            torch.stack([weights[term] for weights in local]).sum() for term in self.stage.terms
        ]
        values += [torch.as_tensor(wants_stop), torch.as_tensor(num_bad_steps)]
        on_device = [value.to(self.device, non_blocking=True).float() for value in values]
        self._control = torch.stack(on_device)
        self._work = collectives.start_sum_over_ranks(self._control)
        self._weights = None

    def denominators(self) -> Sums:
        """Global weight of each loss term (0-d tensors on the device) of the window that was started."""
        if self._weights is None:
            if self._work is not None:
                self._work.wait()
            self._remember(self._control[-2:])
            self._weights = dict(zip(self.stage.terms, self._control[:-2], strict=True))
        return self._weights

    def _remember(self, flags: torch.Tensor) -> None:
        if self.device.type == "cuda":
            self._flags = torch.empty(flags.shape, pin_memory=True)
            self._flags.copy_(flags, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._flags = flags

    def stop_agreed(self) -> bool:
        """Whether any rank wanted to stop when the last window's weights were asked for."""
        return self._read(0) > 0

    def num_bad_steps(self) -> int:
        """How many bad steps in a row came before the last window."""
        return round(self._read(1) / collectives.world_size())

    def _read(self, place: int) -> float:
        if self._flags is None:
            return 0.0
        if self._copied is not None:
            self._copied.synchronize()  # the copy was made a whole step ago
        return float(self._flags[place])


class RunningSums:
    """Adds up [sum, weight] pairs on the device; ratios are formed only when they are logged.

    A pair may be of vectors ([2, n]); its ratios are then called `name.0` to `name.n-1`.
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
        totals, weights = collectives.sum_over_ranks(table).tolist()
        return {
            name: (total / weight if weight else float("nan"))
            for name, total, weight in zip(columns, totals, weights, strict=True)
        }
