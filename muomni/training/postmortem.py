"""Diagnose a step with a non-finite loss or gradient before the run stops.

The micro-batches of the step run again, forward and backward, with hooks on all modules and parameters. All
ranks do so together, since ZeRO-3 and expert parallelism communicate on the way. A rank that finds something
writes `nonfinite/step_N_rankR.pt`, which `torch.load(weights_only=True)` reads, and a JSON report of the same
name.

Afterward the engine holds useless gradients: the run must end.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from muomni.data.loading.loader import to_device
from muomni.data.views.base import Batch
from muomni.distributed import collectives
from muomni.io.atomic_write import open_atomic, write_atomic
from muomni.run_folder import RunFolder
from muomni.training.engine.engine import Engine
from muomni.training.engine.expert_parallel import expert_groups
from muomni.training.feed import Feed
from muomni.training.outputs import Sums
from muomni.training.stage import Stage
from muomni.training.step_reduction import StepReduction

SCHEMA_VERSION = 1
_NUM_NAMED = 4


@dataclass(slots=True)
class Finding:
    """The non-finite values of one micro-batch (counted from 0).

    `module` is the first module with such an output (`phase` forward) or gradient (backward); `losses` are
    the loss sums of the micro-batch, `parameters` names those with a non-finite gradient.
    """

    micro_batch: int
    phase: str
    module: str
    losses: dict[str, float | str]
    parameters: list[str]


@dataclass(slots=True)
class Culprit:
    """A finding for all ranks: its rank, the keys of its samples, and the file with details."""

    rank: int
    finding: Finding
    keys: list[str]
    file: str

    def __str__(self) -> str:
        what = "output" if self.finding.phase == "forward" else "gradient"
        named = ", ".join(self.keys[:_NUM_NAMED])
        more = len(self.keys) - _NUM_NAMED
        return (
            f"{self.finding.module} has the first non-finite {what} (rank {self.rank}, "
            f"micro-batch {self.finding.micro_batch} with samples {named}"
            f"{f' and {more} more' if more > 0 else ''}; {self.file})"
        )


def _likelihood(culprit: Culprit) -> tuple[bool, bool, int]:
    """Sort key: the rank of the fault before those it spread to, since experts see tokens of all ranks."""
    finding = culprit.finding
    return finding.phase != "forward", finding.module.endswith(".experts"), culprit.rank


class PostMortem:
    """Diagnoses steps of `feed` that `stage` trained with `engine`; writes files to `folder`."""

    def __init__(self, stage: Stage, engine: Engine, feed: Feed, folder: RunFolder) -> None:
        self.stage = stage
        self.engine = engine
        self.feed = feed
        self.folder = folder.nonfinite

    def examine(self, step: int) -> str:
        """Describe what is non-finite in the `step`-th step, and write files; every rank must call it.

        If nothing is found, every rank writes its micro-batches.
        """
        read = self.feed.read(step - 1)
        micro_batches = self.stage.begin_step(
            self.engine.forward, [self._prepared(r.batch) for r in read]
        )
        reduction = StepReduction(self.stage, self.stage.context.device)
        reduction.start(micro_batches, wants_stop=False)
        denominators = reduction.denominators()
        findings = [
            finding
            for number, batch in enumerate(micro_batches)
            if (finding := self._rerun(number, batch, denominators)) is not None
        ]
        dump = self.folder / f"step_{step}_rank{collectives.rank()}.pt"
        culprit = None
        samples = [r.origins for r in read]
        if findings:
            keys = [str(sample["key"]) for sample in samples[findings[0].micro_batch]]
            culprit = Culprit(collectives.rank(), findings[0], keys, str(dump))
        culprits = [c for c in collectives.gather_objects(culprit) if c is not None]
        culprits.sort(key=_likelihood)
        if culprit is not None or not culprits:
            self._write(dump, step, micro_batches, samples, denominators, findings)
        collectives.barrier()
        if culprits:
            return str(culprits[0])
        return (
            f"all outputs and gradients of step {step} are finite on every rank when it runs again, so the "
            f"sum over micro-batches and ranks overflowed, or a device erred ({self.folder})"
        )

    def _prepared(self, batch: Batch) -> Batch:
        with torch.no_grad():
            return self.stage.prepare(to_device(batch, self.stage.context.device))

    def _rerun(self, number: int, batch: Batch, denominators: Sums) -> Finding | None:
        seen = Seen()
        with watched(self.engine.task, seen):
            output = self.engine.forward(batch)
            losses = {term: _number(loss) for term, loss in output.losses.items()}
            for term, loss in output.losses.items():
                seen.note_output(f"loss '{term}'", loss)
            self.engine.backward(output, denominators, self.stage.loss_weights(), is_last=False)
        if seen.outputs:
            return Finding(number, "forward", seen.outputs[0], losses, seen.parameters)
        if seen.gradients:
            return Finding(number, "backward", seen.gradients[0], losses, seen.parameters)
        return None

    def _write(
        self,
        path: Path,
        step: int,
        micro_batches: list[Batch],
        samples: list[list[dict[str, Any]]],
        denominators: Sums,
        findings: list[Finding],
    ) -> None:
        about = {
            "schema_version": SCHEMA_VERSION,
            "stage": self.stage.name,
            "step": step,
            "rank": collectives.rank(),
            "world_size": collectives.world_size(),
            "precision": self.engine.precision,
            "loss_scale": self.engine.loss_scale,
            "loss_denominators": {term: count.item() for term, count in denominators.items()},
        }
        dumped = [
            {"samples": origins, "batch": {name: t.detach().cpu().clone() for name, t in b.items()}}
            for origins, b in zip(samples, micro_batches, strict=True)
        ]
        with open_atomic(path) as file:
            torch.save({**about, "micro_batches": dumped}, file)
        report = {
            **about,
            "findings": [
                {**{f.name: getattr(found, f.name) for f in fields(found)},
                 "samples": samples[found.micro_batch]}
                for found in findings
            ],
            "dump": path.name,
        }  # fmt: skip
        text = json.dumps(report, indent=1, ensure_ascii=False)
        write_atomic(path.with_suffix(".json"), text.encode())


@dataclass(slots=True)
class Seen:
    """Names of modules and parameters with non-finite values, in temporal order."""

    outputs: list[str] = field(default_factory=list)
    gradients: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)

    def note_output(self, name: str, output: Any) -> None:
        """Check the output of module `name` now, and its gradient in the backward pass."""
        for tensor in _tensors(output):
            if tensor.is_floating_point():
                if not torch.isfinite(tensor).all():
                    self.outputs.append(name)
                if tensor.requires_grad:
                    tensor.register_hook(partial(self.note_gradient, name))

    def note_gradient(self, name: str, gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all():
            self.gradients.append(name)

    def note_parameter(self, name: str, gradient: Tensor) -> None:
        if not torch.isfinite(gradient).all():
            self.parameters.append(name)
            self.gradients.append(name.rpartition(".")[0])


@contextmanager
def watched(task: nn.Module, seen: Seen) -> Iterator[None]:
    """Let `seen` check all module outputs and all gradients inside `task`.

    Blocks that are recomputed in the backward pass are checked twice, which does not change the first
    finding. Outputs of expert-parallel experts contain uninitialized rows, so only the layer around them is
    checked.
    """
    padded = {name.rpartition(".")[0] for name in expert_groups(task)}
    hooks = [
        module.register_forward_hook(
            lambda _module, _inputs, output, name=name: seen.note_output(name, output)
        )
        for name, module in task.named_modules()
        if name and name not in padded
    ]
    hooks += [
        parameter.register_hook(partial(seen.note_parameter, name))
        for name, parameter in task.named_parameters()
        if parameter.requires_grad
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _number(value: Tensor) -> float | str:
    """A number for JSON, which has no NaN and no infinity."""
    return value.item() if torch.isfinite(value) else str(value.item())


def _tensors(output: Any) -> Iterable[Tensor]:
    """All tensors in a module's output."""
    if isinstance(output, Tensor):
        yield output
        return
    parts: Iterable[Any] = ()
    if isinstance(output, dict):
        parts = output.values()
    elif isinstance(output, (tuple, list)):
        parts = output
    elif is_dataclass(output):
        parts = [getattr(output, part.name) for part in fields(output)]
    for part in parts:
        yield from _tensors(part)
