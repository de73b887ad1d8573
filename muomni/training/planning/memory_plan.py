"""Memory of one rank under ZeRO 0 to 3, by part, predicted from a trace of a step and the model's sizes.

What DeepSpeed 0.19.8 allocates was read in its source (`runtime/engine.py`, `zero/stage_1_and_2.py`,
`zero/stage3.py`, `fp16/unfused_optimizer.py`); ZeRO itself is Rajbhandari et al. 2020, arXiv:1910.02054.
A test holds the prediction against the bytes that tensors of real ranks take.

A step has four moments that may be the fullest: the start (whole fp32 weights before they are cast and
divided), what comes before the first forward pass, forward and backward pass, and the update. What offload
moves to the host stays there from the first step to the last, and is counted apart.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from muomni.training.engine.ds_config import ZeroSettings
from muomni.training.engine.offload import Offload
from muomni.training.planning.live_bytes import Bytes
from muomni.training.planning.step_trace import ACTIVATIONS, LOGITS, WORKSPACE, StepTrace, Stretch

PARAMETERS, GRADIENTS, BUCKETS = "parameters", "gradients", "buckets"
MASTER, MOMENTS, AVERAGE = "fp32_weights", "moments", "average"
PARTS = (
    PARAMETERS, GRADIENTS, MASTER, MOMENTS, AVERAGE, ACTIVATIONS, LOGITS, WORKSPACE, BUCKETS,
)  # fmt: skip

_FP32_BYTES = 4
_NORM_BYTES = 8  # an element of the gradient whose norm is computed, in fp64
# Elements after which the engine without ZeRO sends a bucket of gradients.
_WHOLE_BUCKET = 500_000_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """Elements of a model: of each trained parameter by optimizer group, and of each frozen one.

    `order` numbers the parameters of all groups, one group after the other, as the model has them;
    `num_moments` is how many fp32 values the optimizer keeps for each element of a group.
    """

    groups: tuple[tuple[int, ...], ...]
    num_moments: tuple[int, ...]
    order: tuple[int, ...]
    frozen: tuple[int, ...]
    buffer_bytes: int

    @property
    def trained(self) -> list[int]:
        """Elements of the trained parameters in the order of the model."""
        sizes = [size for group in self.groups for size in group]
        return [size for _, size in sorted(zip(self.order, sizes, strict=True))]


@dataclass(frozen=True, slots=True)
class Setup:
    """What a prediction is made for. `weight_bytes` are those of an element as the model computes.

    On a GPU (`is_gpu`) memory that is reserved but never written takes room, and the host's is another one.
    """

    num_ranks: int
    num_accumulation: int
    weight_bytes: int
    has_average: bool
    is_gpu: bool


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by part at each moment of a step, for one rank under one ZeRO stage.

    `moments` are those of the device, `host` is what offload keeps in the machine's memory for it.
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
        """The most bytes on the device at one moment."""
        return sum(self.moments[self.peak_at].values())

    @property
    def host_peak(self) -> int:
        """Bytes in the machine's memory; zero without offload."""
        return sum(self.host.values())

    @property
    def parts(self) -> Bytes:
        """The most bytes of each part on the device; not all parts are at their most together."""
        return {part: max(m.get(part, 0) for m in self.moments.values()) for part in PARTS}


def predict(zero: ZeroSettings, sizes: Sizes, trace: StepTrace, setup: Setup) -> MemoryPlan:
    """The plan of one rank; the fullest one where ranks differ."""
    engine = {0: _Whole, 1: _SharedState, 2: _SharedGradients, 3: _SharedWeights}[zero.stage]
    return engine(zero, sizes, trace, setup).plan()


class _Whole:
    """Without ZeRO: everything on every rank."""

    def __init__(self, zero: ZeroSettings, sizes: Sizes, trace: StepTrace, setup: Setup) -> None:
        self.zero, self.sizes, self.trace, self.setup = zero, sizes, trace, setup
        self.width, self.offload = setup.weight_bytes, zero.offload
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

    # -- what each kind of engine says of itself ---------------------------------------------------
    def state(self) -> Bytes:
        """Weights and optimizer state between steps."""
        num_elements = self.num_trained + self.num_frozen
        shares = [sum(group) for group in self.sizes.groups]
        # The optimizer updates fp32 weights in place; to 16-bit weights it keeps fp32 copies.
        return self._optimizer(shares, has_copies=not self.is_wide) | {
            PARAMETERS: self.width * num_elements + self.sizes.buffer_bytes
        }

    def start(self) -> Bytes:
        """The fp32 model as it was built, on the device."""
        num_elements = self.num_trained + self.num_frozen
        return {PARAMETERS: _FP32_BYTES * num_elements + self.sizes.buffer_bytes}

    def between_steps(self) -> Bytes:
        return {}

    def during_backward(self) -> Iterator[Bytes]:
        """Gradients and buffers during each stretch of the trace, besides the gradient at its end."""
        accumulated = self.num_trained if self.setup.num_accumulation > 1 else 0
        for finished in self._finished():
            yield {GRADIENTS: self.width * max(accumulated, finished)}

    def during_update(self) -> Iterator[Bytes]:
        """Gradients and buffers at the full moments of the update."""
        gradients = self.width * self.num_trained
        in_flight = min(self.num_trained, _WHOLE_BUCKET + max(self.sizes.trained))
        is_alone = self.setup.num_ranks == 1  # the engine then sends nothing
        yield {GRADIENTS: gradients, BUCKETS: 0 if is_alone else self.width * in_flight}
        if not self.is_wide:
            yield {GRADIENTS: gradients + _FP32_BYTES * self.num_trained}

    def on_host(self) -> Bytes:
        """What lies in host memory instead."""
        return {}

    # -- arithmetic that they share ----------------------------------------------------------------
    def _optimizer(self, shares: list[int], has_copies: bool) -> Bytes:
        """fp32 state for so many elements of each group."""
        num_moments = sum(n * m for n, m in zip(shares, self.sizes.num_moments, strict=True))
        return {
            MASTER: _FP32_BYTES * sum(shares) * has_copies,
            MOMENTS: _FP32_BYTES * num_moments,
            AVERAGE: _FP32_BYTES * sum(shares) * self.setup.has_average,
        }

    def _pinned(self, num_bytes: int) -> int:
        """Host memory of a page-locked buffer: torch makes each a power of two for GPUs."""
        return 1 << (num_bytes - 1).bit_length() if self.setup.is_gpu and num_bytes else num_bytes

    def _optimizer_buffer(self, num_bytes: int) -> int:
        return self._pinned(num_bytes) if self.offload.has_pinned_optimizer else num_bytes

    def _finished(self) -> Iterator[int]:
        """Elements of the gradients that are finished before each stretch."""
        trained = self.sizes.trained
        ended = [s.parameter for s in self.trace.stretches[:-1] if s.parameter is not None]
        yield from accumulate((trained[number] for number in ended), initial=0)


class _SharedState(_Whole):
    """ZeRO 1: optimizer state is divided; gradients are reduced in buckets on the last micro-batch."""

    reduces_each_micro_batch = False

    def __init__(self, zero: ZeroSettings, sizes: Sizes, trace: StepTrace, setup: Setup) -> None:
        super().__init__(zero, sizes, trace, setup)
        granule = 2 * setup.num_ranks
        padded = [-(-sum(group) // granule) * granule for group in sizes.groups]
        self.num_padded = sum(padded)
        self.shares = [size // setup.num_ranks for size in padded]
        # A parameter that lies in two shares keeps its whole gradient on both ranks.
        self.num_own = self._most_touched(lambda size: size)
        self.largest = max(sizes.trained)

    def state(self) -> Bytes:
        parameters = self.width * (self.num_padded + self.num_frozen) + self.sizes.buffer_bytes
        if self.offload.optimizer:
            # The buffer through which accumulated gradients come back.
            return {PARAMETERS: parameters, BUCKETS: self.width * self.largest}
        return self._optimizer(self.shares, has_copies=True) | {PARAMETERS: parameters}

    def start(self) -> Bytes:
        return _sum(super().start(), {BUCKETS: self.width * max(map(sum, self.sizes.groups))})

    def during_backward(self) -> Iterator[Bytes]:
        is_split = self.setup.num_accumulation > 1
        num_own = 0 if self.offload.optimizer else self.num_own
        waiting = self.num_trained if is_split and not self.reduces_each_micro_batch else 0
        kept = num_own if is_split and self.reduces_each_micro_batch else 0
        buckets = _Buckets(self.zero, self.setup, 2 if self.zero.overlaps else 1)
        # The first gradient makes the buffers; those of ZeRO 1 then stay to the end of the window.
        reserved = buckets.reserved if waiting else 0
        own = 0
        for finished, sent in buckets.follow(self.trace.stretches, self.sizes.trained):
            held = max(0, waiting - finished) + kept
            # The parts for several ranks travel in a copy; then what is this rank's is put aside.
            travels = max(sent * (self.setup.num_ranks > 1), num_own - own) if sent else 0
            in_transit = self.width * travels
            if sent and self.offload.optimizer:  # norms are taken before gradients leave
                in_transit = max(in_transit, _NORM_BYTES * self.largest)
            yield {
                GRADIENTS: self.width * (held + own),
                BUCKETS: self.width * reserved + in_transit,
            }
            reserved = buckets.reserved
            if sent:
                own = num_own

    def during_update(self) -> Iterator[Bytes]:
        if self.offload.optimizer:
            yield {}
            return
        gradients = self.width * self.num_own
        yield {GRADIENTS: gradients, BUCKETS: _NORM_BYTES * self.largest}
        # One group after the other is flattened, and made fp32.
        copies = max(self.shares) * (_FP32_BYTES + (0 if self.is_wide else self.width))
        yield {GRADIENTS: gradients + copies}

    def on_host(self) -> Bytes:
        if not self.offload.optimizer:
            return {}
        room = self._optimizer_buffer
        fp32 = sum(room(_FP32_BYTES * share) for share in self.shares)
        accumulated = 0
        if self.reduces_each_micro_batch and self.setup.num_accumulation > 1:
            accumulated = self._most_touched(lambda size: room(self.width * size))
        return self._optimizer(self.shares, has_copies=True) | {
            MASTER: fp32,
            GRADIENTS: fp32 + accumulated,
            PARAMETERS: sum(room(self.width * share) for share in self.shares),
            BUCKETS: room(self.width * self.largest),
        }

    def _most_touched(self, measure: Callable[[int], int]) -> int:
        """Sum over the parameters that lie in a rank's share, in part or whole, of the fullest rank."""
        by_group = [
            _touched_by_rank(group, share, self.setup.num_ranks, measure)
            for group, share in zip(self.sizes.groups, self.shares, strict=True)
        ]
        return max(map(sum, zip(*by_group, strict=True)))


class _SharedGradients(_SharedState):
    """ZeRO 2: gradients of other ranks' shares go with their bucket, in each micro-batch."""

    reduces_each_micro_batch = True


class _SharedWeights(_Whole):
    """ZeRO 3: weights, too, are divided, and gathered while they are used."""

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

    def between_steps(self) -> Bytes:
        buckets = _Buckets(self.zero, self.setup, 1)
        return {GRADIENTS: self._gradients, BUCKETS: self.width * buckets.reserved}

    def during_backward(self) -> Iterator[Bytes]:
        buckets = _Buckets(self.zero, self.setup, 1)
        # A gradient is here again, in fp64, while its norm is taken before it leaves.
        leaves = _NORM_BYTES * self._share(max(self.sizes.trained)) * self.offload.optimizer
        for finished, sent in buckets.follow(self.trace.stretches, self.sizes.trained):
            yield {
                PARAMETERS: self.width * self._num_gathered(finished),
                GRADIENTS: self._gradients,
                BUCKETS: self.width * (buckets.reserved + sent) + leaves * (sent > 0),
            }

    def during_update(self) -> Iterator[Bytes]:
        buckets = _Buckets(self.zero, self.setup, 1)
        buckets.touch(self.num_trained)
        reserved = self.width * buckets.reserved
        if self.offload.optimizer:
            yield {BUCKETS: reserved}
            return
        copies = min(max(self.shares), self.zero.sub_group_size)
        copies *= _FP32_BYTES + (0 if self.is_wide else self.width)
        norm = _NORM_BYTES * self._share(max(self.sizes.trained))
        yield {GRADIENTS: self._gradients, BUCKETS: reserved + norm}
        yield {GRADIENTS: self._gradients + copies, BUCKETS: reserved}

    def on_host(self) -> Bytes:
        host: Bytes = {}
        if self.offload.optimizer:
            room, limit = self._optimizer_buffer, self.zero.sub_group_size
            parts = [min(limit, n - at) for n in self.shares for at in range(0, n, limit)]
            host = self._optimizer(self.shares, has_copies=True)
            host[GRADIENTS] = room(self.width * self.num_share)
            host[GRADIENTS] += sum(room(_FP32_BYTES * part) for part in parts)
        if self.offload.parameters:
            # One buffer for each group of trained weights, page-locked whatever is asked for.
            host[PARAMETERS] = sum(self._pinned(self.width * share) for share in self.shares)
            host[PARAMETERS] += sum(map(self._alone, self.sizes.frozen))
            if self.setup.is_gpu and self.offload.has_pinned_parameters:
                # The shares lay alone before, and torch does not give page-locked memory back.
                host[PARAMETERS] += sum(map(self._alone, self.sizes.trained))
        return host

    def _alone(self, size: int) -> int:
        """Host memory of this rank's share of one parameter."""
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
        """Bytes of this rank's share of the gradients on the device."""
        return 0 if self.offload.optimizer else self.width * self.num_share

    @property
    def _is_gathered(self) -> bool:
        """Whether a weight in use is another tensor than this rank's share of it."""
        return self.setup.num_ranks > 1 or (self.offload.parameters and self.setup.is_gpu)

    def _share(self, size: int) -> int:
        return -(-size // self.setup.num_ranks)

    def _is_small(self, size: int) -> bool:
        """Whether every rank always has the whole of a parameter."""
        return size <= self.zero.persistence_threshold

    def _num_gathered(self, num_finished: int) -> int:
        """Elements of foreign weights that are here: what is used again soon is kept until then."""
        if not self._is_gathered:
            return 0
        large = [n for n in self._all_sizes if not self._is_small(n)]
        limit = self.zero.max_reuse_distance + self.zero.prefetch_bucket + max(large, default=0)
        return max(0, min(sum(large) - num_finished, limit))


class _Buckets:
    """The buffers in which finished gradients wait until they are reduced; counts elements."""

    def __init__(self, zero: ZeroSettings, setup: Setup, num_buffers: int) -> None:
        self._size = zero.reduce_bucket
        self._written = [0] * num_buffers
        self._is_gpu = setup.is_gpu
        self._waiting = 0

    @property
    def reserved(self) -> int:
        """Elements of all buffers, or those that were ever written."""
        return self._size * len(self._written) if self._is_gpu else sum(self._written)

    def touch(self, size: int) -> None:
        """Write up to `size` elements into the buffer in use."""
        self._written[0] = max(self._written[0], min(size, self._size))

    def follow(self, stretches: Sequence[Stretch], trained: list[int]) -> Iterator[tuple[int, int]]:
        """For each stretch: elements finished before it, and elements that are sent at its end."""
        finished = 0
        for stretch in stretches:
            size = 0 if stretch.parameter is None else trained[stretch.parameter]
            sent = 0
            if stretch.parameter is None or self._waiting + size > self._size:
                sent, self._waiting = self._waiting, 0
                self._written.reverse()
            self._waiting += size
            self.touch(self._waiting)
            yield finished, sent
            finished += size


def _touched_by_rank(
    group: tuple[int, ...], share: int, num_ranks: int, measure: Callable[[int], int]
) -> list[int]:
    """`measure` of the parameters of a group that lie in each rank's share, in part or whole, added up."""
    touched = [0] * num_ranks
    start = 0
    for size in group:
        for rank in range(start // share, (start + size - 1) // share + 1):
            touched[rank] += measure(size)
        start += size
    return touched


def _sum(*parts: Bytes) -> Bytes:
    return {part: sum(p.get(part, 0) for p in parts) for part in PARTS}
