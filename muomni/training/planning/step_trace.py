"""One micro-batch of a stage played through with fake weights: which bytes live when, and its FLOPs.

Weights and all that is computed from them are torch's FakeTensors, of a size but without memory or
arithmetic, so a model of any size is traced in seconds on any machine. The batch is a real one, and what
is computed from it alone (masks, positions, which labels count) is computed. So the count holds for every
stage, activation checkpointing and loss as they are, with no formula to keep up with them.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from muomni.data.views.base import Batch
from muomni.distributed import collectives
from muomni.models.layers import losses
from muomni.models.speech import ctc
from muomni.models.vision import contrastive
from muomni.training.engine.precision import DTYPES
from muomni.training.planning.live_bytes import Bytes, LiveBytes, storage_bytes
from muomni.training.stage import Stage

ACTIVATIONS, LOGITS, WORKSPACE = "activations", "logits", "workspace"

_LOSS_FILES = {module.__file__ for module in (losses, ctc, contrastive)}
_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Stretch:
    """From one finished gradient to the next: the fullest moment, and which one ends it.

    `live` holds what the forward pass made, what the loss made, and what the backward pass made: working
    memory and the gradient that is being finished. `parameter` is its number among those that are trained,
    in the order of the model; None for what comes after the last one.
    """

    live: Bytes
    parameter: int | None


@dataclass(frozen=True, slots=True)
class StepTrace:
    """What one rank needs in a step besides weights, gradients and optimizer.

    `stretches` are those of one micro-batch, `before` the fullest moment before the first of them (frozen
    models compute, features of all micro-batches are made), `resident` what is always there (the batches
    of the step, frozen models). `flops` are those of the whole step.
    """

    stretches: tuple[Stretch, ...]
    before: Bytes
    resident: int
    flops: int


class FakeStep(LiveBytes):
    """LiveBytes for fake weights beside real batches; decides what would depend on a fake value."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _INDEXING:
            args = (args[0], _integer_indices(args[1]), *args[2:])
        elif func is _aten.bincount.default and isinstance(args[0], FakeTensor):
            return _even_counts(args[0].numel(), kwargs.get("minlength", args[-1]))
        elif func in _CTC_LOSSES and isinstance(args[0], FakeTensor):
            return _ctc_outputs(*args[:4])
        return func(*args, **kwargs)


_INDEXING = {
    _aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default,
    _aten._index_put_impl_.default, _aten._unsafe_index.Tensor,
}  # fmt: skip
_CTC_LOSSES = {_aten._ctc_loss.default, _aten._ctc_loss.Tensor}


def _integer_indices(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Masks that are known become numbers of rows, so that the result has a known size."""
    numbers: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool
        if index is not None and is_mask and not isinstance(index, FakeTensor):
            numbers += index.nonzero(as_tuple=True)
        else:
            numbers.append(index)
    return numbers


def _even_counts(total: int, num_places: int) -> Tensor:
    """Tokens of each expert, when the router sends as many to one as to another."""
    counts = torch.full((num_places,), total // num_places)
    counts[: total % num_places] += 1
    return counts


def _ctc_outputs(log_probs: Tensor, labels: Tensor, _lengths: Any, label_lengths: Any) -> Any:
    """Loss [B] and the forward variables [B, T, 2L + 1] that the backward pass needs."""
    num_frames, batch, _ = log_probs.shape
    longest = max(torch.as_tensor(label_lengths).tolist(), default=0)
    variables = log_probs.new_empty(batch, num_frames, 2 * longest + 1)
    return log_probs.new_empty(batch), variables


def trace_step(stage: Stage, batches: list[Batch], precision: str, num_ranks: int) -> StepTrace:
    """Play a step of one of `num_ranks` ranks, whose micro-batches are `batches`, with fake weights.

    Batches are what the loader gives, on the CPU.
    """
    with torch.device("meta"):
        task = stage.build()
    stage.set_up(task)
    make_fake(task, DTYPES[precision])
    return play_step(stage, task.train(), batches, num_ranks)


def play_step(stage: Stage, task: nn.Module, batches: list[Batch], num_ranks: int = 1) -> StepTrace:
    """Run what comes before the first forward pass, and one micro-batch, the largest, forward and backward."""
    phase = [ACTIVATIONS]
    live = FakeStep(lambda: LOGITS if _is_in_loss() else phase[0])
    frozen = [t for model in stage.frozen_models() for t in model.state_dict().values()]
    given = [tensor for batch in batches for tensor in batch.values()]
    live.leave_out([*task.parameters(), *task.buffers(), *frozen, *given])
    with collectives.simulated(num_ranks), live:
        with torch.no_grad():
            window = [stage.prepare(batch) for batch in batches]
        largest = max(range(len(window)), key=lambda i: storage_bytes(window[i].values()))
        window = stage.begin_step(task, window)
        before, flops_before = live.peak, live.flops
        stretches: list[Stretch] = []
        with _cut_at_gradients(task, live, stretches):
            output = task(window[largest])
            phase[0] = WORKSPACE
            total = torch.stack(list(output.losses.values())).sum()
            del output
            total.backward()
        stretches.append(Stretch(live.peak, None))
    resident = storage_bytes(given) + storage_bytes(frozen)
    flops = flops_before + len(batches) * (live.flops - flops_before)
    return StepTrace(tuple(stretches), before, resident, flops)


def make_fake(module: nn.Module, dtype: torch.dtype) -> None:
    """Give a module of the meta device fake weights of `dtype` on the CPU; buffers keep their own."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    made: dict[int, Any] = {}  # tied weights stay tied
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None and id(weight) not in made:
                with mode:
                    empty = torch.empty(weight.shape, dtype=dtype)
                made[id(weight)] = nn.Parameter(empty, weight.requires_grad)
            part._parameters[name] = made.get(id(weight))
        for name, buffer in part._buffers.items():
            if buffer is not None and id(buffer) not in made:
                with mode:
                    made[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
            part._buffers[name] = made.get(id(buffer))


@contextmanager
def _cut_at_gradients(task: nn.Module, live: LiveBytes, found: list[Stretch]) -> Iterator[None]:
    """Cut at each finished gradient, and drop it: who keeps it, and how, is up to the engine."""

    def cut(number: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            found.append(Stretch(live.peak, number))
            parameter.grad = None
            live.start_peak()

        return hook

    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(cut(n)) for n, p in enumerate(trained)]
    live.start_peak()
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_in_loss() -> bool:
    """Whether code of a loss is running."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename in _LOSS_FILES:
            return True
        frame = frame.f_back
    return False
