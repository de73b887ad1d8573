"""Predict the memory of one rank under ZeRO 0 to 3 (Rajbhandari et al. 2020, arXiv:1910.02054), by part.

The input is the trace of a step and the parameter sizes. The allocations follow the source of DeepSpeed 0.19.8
(`runtime/engine.py`, `zero/stage_1_and_2.py`, `zero/stage3.py`, `fp16/unfused_optimizer.py`). A test compares
the prediction with the tensors of real ranks.

Memory can peak at four moments: the start (full fp32 weights before they are cast, except under ZeRO 3), before
the first forward pass, during forward and backward pass, and during the update. Offloaded state stays on the
host and is counted separately.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate

from muomni.training.engine.ds_config import ZeroSettings
from muomni.training.engine.offload import Offload
from muomni.training.planning.gradient_layout import Buckets, Setup, Sizes, overlap_by_rank
from muomni.training.planning.live_bytes import Bytes
from muomni.training.planning.step_trace import ACTIVATIONS, LOGITS, WORKSPACE, StepTrace

PARAMETERS, GRADIENTS, BUCKETS = "parameters", "gradients", "buckets"
MASTER, MOMENTS, AVERAGE = "fp32_weights", "moments", "average"
PARTS = (
    PARAMETERS, GRADIENTS, MASTER, MOMENTS, AVERAGE, ACTIVATIONS, LOGITS, WORKSPACE, BUCKETS,
)  # fmt: skip

_FP32_BYTES = 4
_NORM_BYTES = 8  # an element of the gradient whose norm is computed, in fp64
# Elements per gradient bucket of the engine without ZeRO.
_PLAIN_BUCKET = 500_000_000


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by part at each moment of a step, for one rank under one ZeRO stage.

    `moments` is device memory, `host` is the host memory of offloaded state.
    """

    zero_stage: int
    moments: dict[str, Bytes]
    offload: Offload
    host: Bytes

    @property
    def peak_at(self) -> str:
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def peak(self) -> int:
        """Peak bytes on the device."""
        return sum(self.moments[self.peak_at].values())

    @property
    def step_peak(self) -> int:
        """Peak bytes on the device in a step, without the start."""
        return max(sum(parts.values()) for name, parts in self.moments.items() if name != "start")

    @property
    def host_peak(self) -> int:
        """Bytes in host memory; 0 without offload."""
        return sum(self.host.values())

    @property
    def parts(self) -> Bytes:
        """Peak bytes of each part on the device; parts may peak at different moments."""
        return {part: max(m.get(part, 0) for m in self.moments.values()) for part in PARTS}


def predict(zero: ZeroSettings, sizes: Sizes, trace: StepTrace, setup: Setup) -> MemoryPlan:
    """Predict the memory of one rank, the one with the most if ranks differ."""
    engine = {0: _Unsharded, 1: _ShardedState, 2: _ShardedGradients, 3: _ShardedWeights}[zero.stage]
    if zero.stage == 1 and setup.weight_bytes < setup.sum_bytes:
        engine = _SummedGradients
    return engine(zero, sizes, trace, setup).plan()


class _Unsharded:
    """Without ZeRO: every rank has all state."""

    def __init__(self, zero: ZeroSettings, sizes: Sizes, trace: StepTrace, setup: Setup) -> None:
        self.zero, self.sizes, self.trace, self.setup = zero, sizes, trace, setup
        self.width, self.offload = setup.weight_bytes, zero.offload
        self.sum_width, self.reduce_width = setup.sum_bytes, setup.reduce_bytes
        self.is_wide = self.width == _FP32_BYTES
        self.num_trained, self.num_frozen = sum(sizes.trained), sum(sizes.frozen)

    def plan(self) -> MemoryPlan:
        state = self.state()
        resident = {**state, ACTIVATIONS: self.trace.resident}
        passes = [
            _sum(resident, stretch.live, engine)
            for stretch, engine in zip(self.trace.stretches, self.during_backward(), strict=True)
        ]
        moments = {
            "start": self.start(),
            "before forward": _sum(resident, self.trace.before, self.between_steps()),
            "forward and backward": max(passes, key=lambda live: sum(live.values())),
            "update": max(
                (_sum(resident, step) for step in self.during_update()),
                key=lambda live: sum(live.values()),
            ),
        }
        return MemoryPlan(self.zero.stage, moments, self.offload, self.on_host())

    # -- overridden per ZeRO stage -----------------------------------------------------------------
    def state(self) -> Bytes:
        """Weights and optimizer state between steps."""
        num_elements = self.num_trained + self.num_frozen
        shares = [sum(group) for group in self.sizes.groups]
        # fp32 weights are updated in place; 16-bit weights have fp32 master weights.
        return self._optimizer(shares, has_copies=not self.is_wide) | {
            PARAMETERS: self.width * num_elements + self.sizes.buffer_bytes
        }

    def start(self) -> Bytes:
        """The fp32 model on the device, as built."""
        num_elements = self.num_trained + self.num_frozen
        return {PARAMETERS: _FP32_BYTES * num_elements + self.sizes.buffer_bytes}

    def between_steps(self) -> Bytes:
        return {}

    def during_backward(self) -> Iterator[Bytes]:
        """Gradients and buffers during each stretch, excluding the gradient that ends it."""
        accumulated = self.num_trained if self.setup.accumulates else 0
        for finished in self._finished():
            yield {GRADIENTS: self.sum_width * max(accumulated, finished)}

    def during_update(self) -> Iterator[Bytes]:
        """Gradients and buffers at the possible peaks of the update."""
        gradients = self.sum_width * self.num_trained
        in_flight = min(self.num_trained, _PLAIN_BUCKET + max(self.sizes.trained))
        is_alone = self.setup.num_ranks == 1  # then nothing is communicated
        yield {GRADIENTS: gradients, BUCKETS: 0 if is_alone else self.sum_width * in_flight}

    def on_host(self) -> Bytes:
        """Offloaded state in host memory."""
        return {}

    # -- shared by all stages ----------------------------------------------------------------------
    def _optimizer(self, shares: list[int], has_copies: bool) -> Bytes:
        """fp32 state for `shares` elements of each group."""
        num_moments = sum(n * m for n, m in zip(shares, self.sizes.num_moments, strict=True))
        return {
            MASTER: _FP32_BYTES * sum(shares) * has_copies,
            MOMENTS: _FP32_BYTES * num_moments,
            AVERAGE: _FP32_BYTES * sum(shares) * self.setup.has_average,
        }

    def _pinned(self, num_bytes: int) -> int:
        """Host memory of a page-locked buffer: for GPUs, torch rounds it up to a power of two."""
        return 1 << (num_bytes - 1).bit_length() if self.setup.is_gpu and num_bytes else num_bytes

    def _optimizer_buffer(self, num_bytes: int) -> int:
        return self._pinned(num_bytes) if self.offload.has_pinned_optimizer else num_bytes

    def _finished(self) -> Iterator[int]:
        """Yield the elements of the gradients finished before each stretch."""
        trained = self.sizes.trained
        ended = [s.parameter for s in self.trace.stretches[:-1] if s.parameter is not None]
        yield from accumulate((trained[number] for number in ended), initial=0)


class _ShardedState(_Unsharded):
    """ZeRO 1: optimizer state is sharded; gradients are reduced in buckets on the last micro-batch."""

    reduces_each_micro_batch = False

    def __init__(self, zero: ZeroSettings, sizes: Sizes, trace: StepTrace, setup: Setup) -> None:
        super().__init__(zero, sizes, trace, setup)
        granule = 2 * setup.num_ranks
        padded = [-(-sum(group) // granule) * granule for group in sizes.groups]
        self.num_padded = sum(padded)
        self.shares = [size // setup.num_ranks for size in padded]
        # A parameter that overlaps two shards keeps its full gradient on both ranks.
        self.num_own = self._max_overlap(lambda size: size)
        self.largest = max(sizes.trained)

    def state(self) -> Bytes:
        parameters = self.width * (self.num_padded + self.num_frozen) + self.sizes.buffer_bytes
        if self.offload.optimizer:
            # The buffer for copying accumulated gradients back.
            return {PARAMETERS: parameters, BUCKETS: self.width * self.largest}
        return self._optimizer(self.shares, has_copies=True) | {PARAMETERS: parameters}

    def start(self) -> Bytes:
        return _sum(super().start(), {BUCKETS: self.width * max(map(sum, self.sizes.groups))})

    def during_backward(self) -> Iterator[Bytes]:
        is_split = self.setup.accumulates
        num_own = 0 if self.offload.optimizer else self.num_own
        waiting = self.num_trained if is_split and not self.reduces_each_micro_batch else 0
        kept = num_own if is_split and self.reduces_each_micro_batch else 0
        buckets = Buckets(self.zero, self.setup, 2 if self.zero.overlaps else 1)
        # Buffers are allocated with the first gradient; ZeRO 1 keeps them until the end of the step.
        reserved = buckets.reserved if waiting else 0
        own = 0
        for finished, sent in buckets.follow(self.trace.stretches, self.sizes.trained):
            held = max(0, waiting - finished) + kept
            # Gradients are reduced in a copy; then this rank's own part is copied out.
            in_transit = max(self._reduced(sent), self.width * (num_own - own)) if sent else 0
            if sent and self.offload.optimizer:  # norms are computed before gradients are offloaded
                in_transit = max(in_transit, _NORM_BYTES * self.largest)
            yield {
                GRADIENTS: self.width * (held + own),
                BUCKETS: self.width * reserved + in_transit,
            }
            reserved = buckets.reserved
            if sent:
                own = num_own

    def _reduced(self, num_sent: int) -> int:
        """Bytes of the copies in which a bucket is reduced."""
        width = self.width + (self.reduce_width if self.reduce_width != self.width else 0)
        return width * num_sent * (self.setup.num_ranks > 1)

    def during_update(self) -> Iterator[Bytes]:
        if self.offload.optimizer:
            yield {}
            return
        gradients = self.width * self.num_own
        yield {GRADIENTS: gradients, BUCKETS: _NORM_BYTES * self.largest}
        # Groups are flattened and cast to fp32 one at a time.
        copies = max(self.shares) * (_FP32_BYTES + (0 if self.is_wide else self.width))
        yield {GRADIENTS: gradients + copies}

    def on_host(self) -> Bytes:
        if not self.offload.optimizer:
            return {}
        buffer = self._optimizer_buffer
        fp32 = sum(buffer(_FP32_BYTES * share) for share in self.shares)
        accumulated = 0
        if self.reduces_each_micro_batch and self.setup.accumulates:
            accumulated = self._max_overlap(lambda size: buffer(self.width * size))
        return self._optimizer(self.shares, has_copies=True) | {
            MASTER: fp32,
            GRADIENTS: fp32 + accumulated,
            PARAMETERS: sum(buffer(self.width * share) for share in self.shares),
            BUCKETS: buffer(self.width * self.largest),
        }

    def _max_overlap(self, measure: Callable[[int], int]) -> int:
        """Sum `measure` over the parameters that overlap a rank's shard; the maximum over ranks."""
        by_group = [
            overlap_by_rank(group, share, self.setup.num_ranks, measure)
            for group, share in zip(self.sizes.groups, self.shares, strict=True)
        ]
        return max(map(sum, zip(*by_group, strict=True)))


class _ShardedGradients(_ShardedState):
    """ZeRO 2: gradients of other ranks' shards are freed with their bucket, in each micro-batch."""

    reduces_each_micro_batch = True

    def during_backward(self) -> Iterator[Bytes]:
        if self.sum_width == self.width:
            yield from super().during_backward()
            return
        # Sums in fp32 are kept for this rank's shard alone.
        buckets = Buckets(self.zero, self.setup, 2 if self.zero.overlaps else 1)
        own = sum(self.shares) if self.setup.accumulates else 0
        for _, sent in buckets.follow(self.trace.stretches, self.sizes.trained):
            own = sum(self.shares) if sent else own
            reserved = self.width * buckets.reserved
            yield {
                GRADIENTS: self.sum_width * own,
                BUCKETS: reserved + (self.width + self.reduce_width) * sent,
            }

    def during_update(self) -> Iterator[Bytes]:
        if self.sum_width == self.width:
            yield from super().during_update()
            return
        yield {GRADIENTS: self.sum_width * sum(self.shares), BUCKETS: _NORM_BYTES * self.largest}


class _SummedGradients(_ShardedState):
    """ZeRO 1 with 16-bit weights and fp32 sums: DeepSpeed's BF16_Optimizer, whose sums exist at all times."""

    def state(self) -> Bytes:
        return super().state() | {GRADIENTS: self.sum_width * self.num_padded}

    def during_backward(self) -> Iterator[Bytes]:
        for stretch in self.trace.stretches:
            size = 0 if stretch.parameter is None else self.sizes.trained[stretch.parameter]
            yield {BUCKETS: self.sum_width * size}  # the copy in which it is added

    def during_update(self) -> Iterator[Bytes]:
        groups = [sum(group) for group in self.sizes.groups]
        in_flight = min(self.num_padded, _PLAIN_BUCKET + max(groups))
        # A single group is reduced in place.
        yield {BUCKETS: self.sum_width * in_flight * (len(groups) > 1)}


class _ShardedWeights(_Unsharded):
    """ZeRO 3: weights are sharded, too, and gathered during use."""

    def __init__(self, zero: ZeroSettings, sizes: Sizes, trace: StepTrace, setup: Setup) -> None:
        super().__init__(zero, sizes, trace, setup)
        self.shares = [sum(map(self._share, group)) for group in sizes.groups]
        self.num_share = sum(self.shares)

    def state(self) -> Bytes:
        num_small = sum(size for size in self._all_sizes if self._is_small(size))
        if self.offload.parameters:
            num_elements = num_small * self._is_gathered
        else:
            num_elements = self._num_owned + num_small * self._is_gathered
        optimizer: Bytes = {}
        if not self.offload.optimizer:
            optimizer = self._optimizer(self.shares, has_copies=True)
        return optimizer | {PARAMETERS: self.width * num_elements + self.sizes.buffer_bytes}

    def start(self) -> Bytes:
        """Weights are initialized and sharded one by one."""
        largest = max(self._all_sizes)
        return {PARAMETERS: self.width * (self._num_owned + largest) + self.sizes.buffer_bytes}

    def between_steps(self) -> Bytes:
        buckets = Buckets(self.zero, self.setup, 1)
        return {GRADIENTS: self._gradients, BUCKETS: self.reduce_width * buckets.reserved}

    def during_backward(self) -> Iterator[Bytes]:
        buckets = Buckets(self.zero, self.setup, 1)
        # Before offload, the norm of a gradient is computed in fp64.
        norm = _NORM_BYTES * self._share(max(self.sizes.trained)) * self.offload.optimizer
        for finished, sent in buckets.follow(self.trace.stretches, self.sizes.trained):
            yield {
                PARAMETERS: self.width * self._num_gathered(finished),
                GRADIENTS: self._gradients,
                BUCKETS: self.reduce_width * (buckets.reserved + sent) + norm * (sent > 0),
            }

    def during_update(self) -> Iterator[Bytes]:
        buckets = Buckets(self.zero, self.setup, 1)
        buckets.touch(self.num_trained)
        reserved = self.reduce_width * buckets.reserved
        if self.offload.optimizer:
            yield {BUCKETS: reserved}
            return
        copies = min(max(self.shares), self.zero.sub_group_size)
        copies *= _FP32_BYTES + (0 if self.sum_width == _FP32_BYTES else self.width)
        norm = _NORM_BYTES * self._share(max(self.sizes.trained))
        yield {GRADIENTS: self._gradients, BUCKETS: reserved + norm}
        yield {GRADIENTS: self._gradients + copies, BUCKETS: reserved}

    def on_host(self) -> Bytes:
        host: Bytes = {}
        if self.offload.optimizer:
            buffer, limit = self._optimizer_buffer, self.zero.sub_group_size
            parts = [min(limit, n - at) for n in self.shares for at in range(0, n, limit)]
            host = self._optimizer(self.shares, has_copies=True)
            host[GRADIENTS] = buffer(self.width * self.num_share)
            host[GRADIENTS] += sum(buffer(_FP32_BYTES * part) for part in parts)
        if self.offload.parameters:
            # One buffer per group of trained weights, always page-locked.
            host[PARAMETERS] = sum(self._pinned(self.width * share) for share in self.shares)
            host[PARAMETERS] += sum(map(self._own_buffer, self.sizes.frozen))
            if self.setup.is_gpu and self.offload.has_pinned_parameters:
                # Each shard had its own buffer first, and torch does not free page-locked memory.
                host[PARAMETERS] += sum(map(self._own_buffer, self.sizes.trained))
        return host

    def _own_buffer(self, size: int) -> int:
        """Host memory of this rank's shard of one parameter in its own buffer."""
        num_bytes = self.width * self._share(size)
        return self._pinned(num_bytes) if self.offload.has_pinned_parameters else num_bytes

    @property
    def _all_sizes(self) -> tuple[int, ...]:
        return (*self.sizes.trained, *self.sizes.frozen)

    @property
    def _num_owned(self) -> int:
        return self.num_share + sum(map(self._share, self.sizes.frozen))

    @property
    def _gradients(self) -> int:
        """Bytes of this rank's shard of the gradients on the device."""
        return 0 if self.offload.optimizer else self.sum_width * self.num_share

    @property
    def _is_gathered(self) -> bool:
        """Whether a weight in use is a copy rather than this rank's shard itself."""
        return self.setup.num_ranks > 1 or (self.offload.parameters and self.setup.is_gpu)

    def _share(self, size: int) -> int:
        return -(-size // self.setup.num_ranks)

    def _is_small(self, size: int) -> bool:
        """Whether every rank always has the full parameter."""
        return size <= self.zero.persistence_threshold

    def _num_gathered(self, num_finished: int) -> int:
        """Elements of gathered weights, including those kept because they are reused soon."""
        if not self._is_gathered:
            return 0
        large = [n for n in self._all_sizes if not self._is_small(n)]
        limit = self.zero.max_reuse_distance + self.zero.prefetch_bucket + max(large, default=0)
        return max(0, min(sum(large) - num_finished, limit))


def _sum(*parts: Bytes) -> Bytes:
    return {part: sum(p.get(part, 0) for p in parts) for part in PARTS}
