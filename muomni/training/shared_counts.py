"""The ranks of a run count the windows of an epoch together.

A plan alone counts all windows itself; here each rank counts an equal share and all exchange them. It
happens between steps, at the same step on every rank, before the loader's look-ahead reaches the epoch:
inside of the loader ranks would come to it at different moments.
"""

import numpy as np

from muomni.config.run import DataSection
from muomni.data.sampling.plan import Plan
from muomni.distributed import collectives


class SharedCounts:
    """Keeps the plan's counts ahead of training; every rank must make the same calls."""

    def __init__(self, plan: Plan, data: DataSection, num_accumulation: int) -> None:
        self.plan = plan
        # Steps that workers may be ahead, rounded up, and the one that is being fetched.
        self._ahead = -(-data.num_workers * data.prefetch // num_accumulation) + 2

    def count_epochs(self, num_epochs: int) -> None:
        """Count the first `num_epochs` epochs, which says how many steps they have."""
        while (epoch := self.plan.uncounted_epoch(num_epochs=num_epochs)) is not None:
            self._count(epoch)

    def count_ahead(self, step: int, num_steps: int) -> None:
        """Count what may be fetched while step `step` of `num_steps` runs."""
        wanted = min(step + self._ahead, num_steps)
        while (epoch := self.plan.uncounted_epoch(step=wanted)) is not None:
            self._count(epoch)

    def _count(self, epoch: int) -> None:
        cache = self.plan.cache
        is_main = collectives.rank() == 0
        found = cache.find(epoch) if cache is not None and is_main else None
        counts = collectives.broadcast_object(found)
        if counts is None:
            windows, ranks = self.plan.windows.count, collectives.world_size()
            start, stop = (windows * (collectives.rank() + i) // ranks for i in range(2))
            shares = collectives.gather_objects(self.plan.count_windows(epoch, start, stop))
            counts = np.concatenate(shares)
            if cache is not None and is_main:
                cache.save(epoch, counts)
        self.plan.set_counts(epoch, counts)
