"""The interface of a stage: model + loss + the view of the data it needs.

The loop knows only this interface; it never asks which stage it runs. A stage's *task module* holds the
model and computes the loss inside `forward`, because under ZeRO-3 parameters exist only there.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel
from torch import nn

from muomni.checkpoint.export import Export, find_exports
from muomni.config.registry import stage_spec
from muomni.config.run import RunConfig
from muomni.data.sampling.plan import Batching
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.base import Batch, View
from muomni.models.layers.blocks import recompute_activations
from muomni.training.engine.attention import attend_by_documents
from muomni.training.flops import FlopCounter
from muomni.training.outputs import StageOutput, Sums


@dataclass(slots=True)
class StageContext:
    """What a stage is built from besides its config."""

    tokenizer: Tokenizer
    upstream: dict[str, Export]
    device: torch.device


class Stage(ABC):
    """One kind of training. Subclasses live in `muomni/training/stages/`, one file each."""

    terms: tuple[str, ...] = ("loss",)  # a stage may add to them by its config
    # The validation metric that decides which checkpoint is best, and its direction.
    best_metric: ClassVar[str] = "loss"
    best_is_lower: ClassVar[bool] = True

    def __init__(self, config: RunConfig, context: StageContext) -> None:
        self.config = config
        self.context = context
        self.tokenizer = context.tokenizer

    @property
    def name(self) -> str:
        """Its name in the registry."""
        return self.config.stage

    @classmethod
    def find_upstream(cls, config: RunConfig, run: Path) -> dict[str, Export]:
        """Open the exports that the stage begins from: those of `run`, unless its options name others.

        Raises UpstreamError naming those that are missing.
        """
        return find_exports(run, stage_spec(config.stage).upstream)

    # -- data ------------------------------------------------------------------------------------
    @abstractmethod
    def view(self) -> View[Any]:
        """How this stage reads its samples."""

    @abstractmethod
    def batching(self) -> Batching:
        """How samples become micro-batches."""

    # -- model -----------------------------------------------------------------------------------
    @abstractmethod
    def build(self) -> nn.Module:
        """The task module: forward(batch) -> StageOutput."""

    @abstractmethod
    def model(self, task: nn.Module) -> nn.Module:
        """The part of the task module that is exported."""

    @abstractmethod
    def model_config(self) -> BaseModel:
        """Sizes of the exported model; written into its export."""

    def frozen_state(self) -> dict[str, torch.Tensor]:
        """Weights of models outside of the task module that its export holds, too."""
        return {}

    def frozen_models(self) -> list[nn.Module]:
        """Models outside of the task module that run in training, loaded."""
        return []

    def load_export(self, task: nn.Module, export: Export) -> None:
        """Load this stage's own export strictly into a built task module; raises UpstreamError."""
        export.load_into(self.model(task))

    def loss_weights(self) -> dict[str, float]:
        """How much each loss term counts."""
        return dict.fromkeys(self.terms, 1.0)

    @abstractmethod
    def flop_counter(self, task: nn.Module) -> FlopCounter:
        """Counts the FLOPs of training the built `task` on a batch that still is on the host."""

    def set_up(self, task: nn.Module) -> None:
        """Have a built task compute as the config wants it: with activation checkpointing, and rows
        by document. Raises ConfigError."""
        recompute_activations(self.model(task), self.config.training.activation_checkpointing)
        if self.config.training.attention == "varlen":
            attend_by_documents(task)

    # -- one step --------------------------------------------------------------------------------
    def prepare(self, batch: Batch) -> Batch:
        """Add to a batch on the device what needs frozen models; runs without gradient."""
        return batch

    @abstractmethod
    def loss_denominators(self, batch: Batch) -> Sums:
        """Per loss term, the count (0-d tensor) that its sum is divided by, known before forward."""

    def begin_step(
        self, forward: Callable[[Batch], StageOutput], batches: list[Batch]
    ) -> list[Batch]:
        """See all micro-batches of a step before any backward pass (contrastive losses do)."""
        return batches

    def after_step(self, task: nn.Module, state: Sums, step: int) -> None:  # noqa: B027
        """Update what no gradient updates, from state summed over micro-batches and ranks."""

    # -- results ---------------------------------------------------------------------------------
    def metrics(self, ratios: dict[str, float]) -> dict[str, float]:
        """Turn log ratios into reported metrics (perplexity from loss, say)."""
        return ratios
