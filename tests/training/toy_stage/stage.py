"""Predicts the number of characters of a text as a sum over its tokens."""

import torch
from torch import nn

from muomni.data.views.base import Batch
from muomni.training.flops import FlopCounter, StepFlops
from muomni.training.outputs import StageOutput, Sums
from muomni.training.stage import Stage
from tests.training.toy_stage.config import ToyRun, ToySizes
from tests.training.toy_stage.view import ToyView


class ToyTask(nn.Module):
    """A bag of token embeddings and a linear layer."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(vocab_size, hidden_size), nn.Linear(hidden_size, 1))

    def forward(self, batch: Batch) -> StageOutput:
        per_token = self.model(batch["tokens"])[..., 0]
        error = (per_token * (batch["tokens"] > 0)).sum(1) - batch["num_chars"]
        total = (error.square() * (batch["num_chars"] > 0)).sum()
        count = (batch["num_chars"] > 0).sum().float()
        return StageOutput({"loss": total}, {"loss": torch.stack([total.detach(), count])})


class ToyStage(Stage):
    """Trains the toy model."""

    config: ToyRun

    def view(self) -> ToyView:
        return ToyView(self.tokenizer, self.config.options.max_tokens)

    def model_config(self) -> ToySizes:
        return self.config.model

    def build(self) -> ToyTask:
        return ToyTask(self.tokenizer.vocab_size, self.config.model.hidden_size)

    def model(self, task: nn.Module) -> nn.Module:
        assert isinstance(task, ToyTask)
        return task.model

    def flop_counter(self, task: nn.Module) -> FlopCounter:
        flops = 6 * self.config.model.hidden_size
        return lambda batch: StepFlops(int(batch["units"]) * flops, batch["tokens"].numel() * flops)

    def loss_denominators(self, batch: Batch) -> Sums:
        return {"loss": (batch["num_chars"] > 0).sum().float()}
