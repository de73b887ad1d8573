"""Stage `thinker`: next-token prediction over packed documents."""

import math
from contextlib import nullcontext

import torch
from torch import nn

from muomni.config.loading import validate
from muomni.config.models import ThinkerConfig
from muomni.config.run import RunConfig
from muomni.data.plan import Batching
from muomni.data.text_view import IGNORE, TextView
from muomni.data.view import Batch
from muomni.models.moe import record_router_logits
from muomni.models.thinker import Thinker
from muomni.training import routing
from muomni.training.stage import Stage, StageContext, StageOutput, Sums


class ThinkerTask(nn.Module):
    """The Thinker and its loss; with a mixture of experts also those of its routers."""

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.thinker = Thinker(config)
        self.moe = config.moe

    def forward(self, batch: Batch) -> StageOutput:
        recording = nullcontext([]) if self.moe is None else record_router_logits(self.thinker)
        with recording as router_logits:
            hidden = self.thinker(batch["input_ids"], document_ids=batch["document_ids"])
        loss = self.thinker.loss(hidden, batch["labels"])
        total = loss.total.detach()
        logs = {
            "loss": torch.stack([total, loss.weight]),
            "accuracy": torch.stack([loss.num_correct, loss.weight]),
            # nats per byte; `metrics` turns it into bits
            "bits_per_byte": torch.stack([total, batch["num_bytes"]]),
        }
        output = StageOutput({"loss": loss.total}, logs)
        if self.moe is not None and self.training:
            is_real = batch["document_ids"] > 0
            routing.add_router_term(output, self.moe, self.thinker, router_logits, is_real)
        return output


class ThinkerStage(Stage):
    """Trains the decoder LM."""

    name = "thinker"
    tasks = ("text",)

    def __init__(self, config: RunConfig, context: StageContext) -> None:
        super().__init__(config, context)
        self.has_experts = self.model_config().moe is not None
        if self.has_experts:
            self.terms = (*self.terms, routing.TERM)

    def model_config(self) -> ThinkerConfig:
        sizes = {**self.config.model, "vocab_size": self.tokenizer.vocab_size}
        return validate(ThinkerConfig, sizes, "section 'model'")

    def view(self) -> TextView:
        return TextView(self.tokenizer, self.config.batch.size, self.config.batch.rows)

    def batching(self) -> Batching:
        batch = self.config.batch
        return Batching("pack", batch.size, rows=batch.rows, window=batch.window)

    def build(self) -> ThinkerTask:
        return ThinkerTask(self.model_config())

    def model(self, task: ThinkerTask) -> nn.Module:
        return task.thinker

    def weights(self, batch: Batch) -> Sums:
        weights = {"loss": (batch["labels"] != IGNORE).sum().float()}
        return weights | routing.router_weight(batch) if self.has_experts else weights

    def after_step(self, task: ThinkerTask, state: Sums, step: int) -> None:
        if task.moe is not None:
            routing.update_biases(task.moe, task.thinker, state)

    def metrics(self, ratios: dict[str, float]) -> dict[str, float]:
        figures = routing.load_figures(ratios)
        figures["bits_per_byte"] = ratios["bits_per_byte"] / math.log(2)
        figures["perplexity"] = math.exp(min(50.0, ratios["loss"]))
        return figures
