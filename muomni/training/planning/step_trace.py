"""Trace one micro-batch of a stage without memory for its weights, for its memory over time and its FLOPs.

For a CPU, weights and everything computed from them are torch's FakeTensors, which have sizes but no memory, so
models of any size are traced in seconds on any machine. The batch is real, and so is what depends on it alone
(masks, positions, labels). For a GPU, all tensors are on the meta device, so that models take the branches of
accelerators, and `gpu_kernels` adds what CUDA kernels keep and allocate. The trace thus covers every stage,
loss, and checkpointing policy without formulas.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from muomni.data.loading.loader import to_device
from muomni.data.views.base import Batch
from muomni.distributed import collectives
from muomni.models.layers import losses
from muomni.models.speech import ctc
from muomni.models.vision import contrastive
from muomni.training.engine.precision import DTYPES
from muomni.training.planning import gpu_kernels
from muomni.training.planning.live_bytes import Bytes, LiveBytes, storage_bytes
from muomni.training.stage import Stage

ACTIVATIONS, LOGITS, WORKSPACE = "activations", "logits", "workspace"

_LOSS_FILES = {module.__file__ for module in (losses, ctc, contrastive)}
_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Stretch:
    """The interval between two finished gradients: its peak memory, and the parameter that ends it.

    `live` holds the bytes of the forward pass, the loss, and the backward pass (workspace and the gradient in
    progress). `parameter` is an index into the trained parameters in model order; None after the last one.
    """

    live: Bytes
    parameter: int | None


@dataclass(frozen=True, slots=True)
class StepTrace:
    """Memory of one rank in a step, besides weights, gradients, and optimizer state.

    `stretches` are those of one micro-batch, `before` is the peak before the first of them (frozen models,
    features of all micro-batches), `resident` is constant (batches of the step, frozen models, on GPUs the
    workspace of cuBLAS). `flops` covers the entire step.
    """

    stretches: tuple[Stretch, ...]
    before: Bytes
    resident: int
    flops: int


class FakeStep(LiveBytes):
    """LiveBytes for tensors without values; replaces results that depend on values."""

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func in _INDEXING:
            args = (args[0], _integer_indices(args[1]), *args[2:])
        elif func is _aten.bincount.default and _has_no_values(args[0]):
            return gpu_kernels.even_counts(args[0].numel(), kwargs.get("minlength", args[-1]))
        elif func in _CTC_LOSSES and _has_no_values(args[0]):
            return _ctc_outputs(*args[:4])
        elif func in _CTC_GRADIENTS and args[1].is_meta:
            return torch.empty_like(args[1])
        gpu_kernels.allocate_scratch(func, args)
        return func(*args, **kwargs)


_INDEXING = {
    _aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default,
    _aten._index_put_impl_.default, _aten._unsafe_index.Tensor,
}  # fmt: skip
_CTC_LOSSES = {_aten._ctc_loss.default, _aten._ctc_loss.Tensor}
_CTC_GRADIENTS = {_aten._ctc_loss_backward.default, _aten._ctc_loss_backward.Tensor}


def _has_no_values(tensor: Tensor) -> bool:
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def _integer_indices(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Convert real boolean masks to integer indices, so that the result has a known size."""
    numbers: list[Tensor | None] = []
    for index in indices:
        is_mask = index is not None and index.dtype == torch.bool
        if index is not None and is_mask and not _has_no_values(index):
            numbers += index.nonzero(as_tuple=True)
        else:
            numbers.append(index)
    return numbers


def _ctc_outputs(log_probs: Tensor, labels: Tensor, _lengths: Any, label_lengths: Any) -> Any:
    """Return the loss [B] and the forward variables [B, T, 2L + 1] saved for the backward pass."""
    num_frames, batch, _ = log_probs.shape
    lengths = [labels.shape[-1]] if labels.is_meta else torch.as_tensor(label_lengths).tolist()
    longest = max(lengths, default=0)
    variables = log_probs.new_empty(batch, num_frames, 2 * longest + 1)
    return log_probs.new_empty(batch), variables


def trace_step(
    stage: Stage, batches: list[Batch], precision: str, num_ranks: int, kind: str = "cpu"
) -> StepTrace:
    """Trace a step of one of `num_ranks` ranks on devices of a `kind` ("cpu" or "cuda") with fake weights.

    `batches` are the micro-batches of the rank, on the CPU.
    """
    is_gpu = kind == "cuda"
    stage = stage.on(torch.device("meta" if is_gpu else "cpu"))
    with torch.device("meta"):
        task = stage.build()
    stage.set_up(task)
    make_fake(task, DTYPES[precision], is_gpu)
    if not is_gpu:
        return trace_task(stage, task.train(), batches, num_ranks)
    copies = [to_device(batch, torch.device("meta")) for batch in batches]
    with gpu_kernels.stand_ins():
        trace = trace_task(stage, task.train(), copies, num_ranks)
    return replace(trace, resident=trace.resident + gpu_kernels.MATMUL_WORKSPACE_BYTES)


def trace_task(
    stage: Stage, task: nn.Module, batches: list[Batch], num_ranks: int = 1
) -> StepTrace:
    """Trace the work before the first forward pass, then forward and backward of the largest micro-batch."""
    phase = [ACTIVATIONS]
    on_meta = any(parameter.is_meta for parameter in task.parameters())
    live = FakeStep(lambda: LOGITS if _is_in_loss() else phase[0], on_meta)
    frozen = [t for model in stage.frozen_models() for t in model.state_dict().values()]
    inputs = [tensor for batch in batches for tensor in batch.values()]
    live.exclude([*task.parameters(), *task.buffers(), *frozen, *inputs])
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
    resident = storage_bytes(inputs) + storage_bytes(frozen)
    flops = flops_before + len(batches) * (live.flops - flops_before)
    return StepTrace(tuple(stretches), before, resident, flops)


def make_fake(module: nn.Module, dtype: torch.dtype, is_meta: bool = False) -> None:
    """Replace meta weights by fake CPU weights, or meta weights, of `dtype`; buffers keep their dtype."""
    mode = torch.device("meta") if is_meta else FakeTensorMode(allow_non_fake_inputs=True)
    fakes: dict[int, Any] = {}  # tied weights stay tied
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None and id(weight) not in fakes:
                with mode:
                    empty = torch.empty(weight.shape, dtype=dtype)
                fakes[id(weight)] = nn.Parameter(empty, weight.requires_grad)
            part._parameters[name] = fakes.get(id(weight))
        for name, buffer in part._buffers.items():
            if buffer is not None and id(buffer) not in fakes:
                with mode:
                    fakes[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
            part._buffers[name] = fakes.get(id(buffer))


@contextmanager
def _cut_at_gradients(task: nn.Module, live: LiveBytes, found: list[Stretch]) -> Iterator[None]:
    """End a stretch at each finished gradient, and free it: storing gradients is up to the engine."""

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
    """Whether a loss function is on the call stack."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename in _LOSS_FILES:
            return True
        frame = frame.f_back
    return False
