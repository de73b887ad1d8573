"""The interface of a stage: model, loss, and data view.

The training loop uses only this interface. A stage's *task module* holds the model and computes the loss inside
`forward`, because under ZeRO-3 parameters exist only there.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import nn

from muomni.checkpoint.export import Export, find_exports
from muomni.config.registry import stage_spec
from muomni.config.run import RunConfig
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.base import COARSE, EXACT, Batch, Padding, View
from muomni.models.layers.blocks import recompute_activations
from muomni.training.engine.attention import attend_by_documents
from muomni.training.flops import FlopCounter
from muomni.training.outputs import StageOutput, Sums


@dataclass(slots=True)
class StageContext:
    """What a stage needs besides its config."""

    tokenizer: Tokenizer
    upstream: dict[str, Export]
    device: torch.device
    # Attention by documents instead of masks, see `training.attention`.
    uses_varlen: bool = False


class Stage(ABC):
    """Base class of the stages in `muomni/training/stages/`."""

    terms: tuple[str, ...] = ("loss",)  # may be extended depending on the config
    # The validation metric that selects the best checkpoint, and its direction.
    best_metric: ClassVar[str] = "loss"
    best_is_lower: ClassVar[bool] = True
    # Whether the export contains the upstream models, too, so that evaluation does not depend on them.
    exports_upstream: ClassVar[bool] = False

    def __init__(self, config: RunConfig, context: StageContext) -> None:
        self.config = config
        self.context = context
        self.tokenizer = context.tokenizer

    def is_better(self, value: float, best: float | None) -> bool:
        """Whether a value of `best_metric` is finite, and better than the best one so far, if any."""
        is_first = best is None or (value < best if self.best_is_lower else value > best)
        return math.isfinite(value) and is_first

    def on(self, device: torch.device) -> "Stage":
        """This stage, or one for another device, with frozen models of its own."""
        if device == self.context.device:
            return self
        return type(self)(self.config, replace(self.context, device=device))

    @property
    def name(self) -> str:
        """The name in the registry."""
        return self.config.stage

    @classmethod
    def find_upstream(
        cls, config: RunConfig, run: Path, with_hashes: bool = True
    ) -> dict[str, Export]:
        """Open the exports that the stage loads: those of `run`, unless its options name others.

        Raises UpstreamError if some are missing.
        """
        return find_exports(run, stage_spec(config.stage).upstream, with_hashes)

    # -- data ------------------------------------------------------------------------------------
    @property
    def padding(self) -> Padding:
        """How widths of padded tensors are rounded on the device of the run."""
        return COARSE if self.context.device.type == "cuda" else EXACT

    @abstractmethod
    def view(self) -> View[Any]:
        """Return the view that reads the samples."""

    # -- model -----------------------------------------------------------------------------------
    @abstractmethod
    def build(self) -> nn.Module:
        """Build the task module: forward(batch) -> StageOutput."""

    @abstractmethod
    def model(self, task: nn.Module) -> nn.Module:
        """Return the part of the task module that is exported."""

    @abstractmethod
    def model_config(self) -> BaseModel:
        """Return the sizes of the exported model, which its export stores."""

    def frozen_state(self) -> dict[str, torch.Tensor]:
        """Return weights from outside the task module that the export includes."""
        return {}

    def frozen_models(self) -> list[nn.Module]:
        """Return the loaded models outside the task module that training runs."""
        return []

    def load_export(self, task: nn.Module, export: Export) -> None:
        """Load this stage's own export strictly into a task module; raises UpstreamError."""
        export.load_into(self.model(task))

    def loss_weights(self) -> dict[str, float]:
        """Return the weight of each loss term."""
        return dict.fromkeys(self.terms, 1.0)

    @abstractmethod
    def flop_counter(self, task: nn.Module) -> FlopCounter:
        """Return a counter of the FLOPs of training `task` on a host batch."""

    def set_up(self, task: nn.Module) -> None:
        """Apply activation checkpointing and varlen attention to a task; raises ConfigError."""
        recompute_activations(self.model(task), self.config.training.activation_checkpointing)
        if self.context.uses_varlen:
            attend_by_documents(task)

    # -- one step --------------------------------------------------------------------------------
    def prepare(self, batch: Batch) -> Batch:
        """Add the outputs of frozen models to a device batch; runs without gradient."""
        return batch

    @abstractmethod
    def loss_denominators(self, batch: Batch) -> Sums:
        """Return the count (0-d tensor) by which each loss sum is divided, known before forward."""

    @property
    def num_compared(self) -> int | None:
        """Samples whose outputs validation compares with each other; None if it uses each alone."""
        return None

    def begin_step(
        self,
        forward: Callable[[Batch], StageOutput],
        batches: list[Batch],
        over_ranks: bool = True,
    ) -> list[Batch]:
        """Process all micro-batches of a step before any backward pass, as contrastive losses need.

        A step covers all ranks, in validation (`over_ranks` False) this rank only.
        """
        return batches

    def after_step(self, task: nn.Module, state: Sums, step: int) -> None:  # noqa: B027
        """Update state without gradients, such as codebooks.

        `state` is summed over this rank's micro-batches.
        """

    # -- results ---------------------------------------------------------------------------------
    def metrics(self, ratios: dict[str, float]) -> dict[str, float]:
        """Turn logged ratios into metrics, such as perplexity from loss."""
        return ratios
