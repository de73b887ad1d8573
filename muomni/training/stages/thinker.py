"""Stage `thinker`: next-token prediction over packed documents.

With `options.upcycle`, a mixture of experts is initialized from a trained dense Thinker.
"""

import math
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from muomni.checkpoint.export import Export, find_exports
from muomni.config.loading import validate
from muomni.config.models import ThinkerConfig
from muomni.config.run import RunConfig
from muomni.config.stages import ThinkerRun
from muomni.data.views.base import Batch
from muomni.data.views.text import IGNORE, TextView
from muomni.models.language.thinker import Thinker
from muomni.models.language.upcycling import check_upcycling, upcycle
from muomni.models.layers.moe import record_router_logits
from muomni.training import moe
from muomni.training.engine.attention import documents_of
from muomni.training.flops import FlopCounter, count_thinker
from muomni.training.outputs import StageOutput, Sums
from muomni.training.stage import Stage, StageContext


class ThinkerTask(nn.Module):
    """The Thinker and its loss, including router losses for a mixture of experts."""

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.thinker = Thinker(config)
        self.moe = config.moe

    def forward(self, batch: Batch) -> StageOutput:
        recorder = nullcontext([]) if self.moe is None else record_router_logits(self.thinker)
        with recorder as router_logits:
            hidden = self.thinker(batch["input_ids"], **documents_of(batch))
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
            moe.add_router_term(output, self.moe, self.thinker, router_logits, is_real)
        return output


class ThinkerStage(Stage):
    """Trains the decoder LM."""

    config: ThinkerRun

    def __init__(self, config: RunConfig, context: StageContext) -> None:
        super().__init__(config, context)
        sizes = self.model_config()
        self.has_experts = sizes.moe is not None
        if self.has_experts:
            self.terms = (*self.terms, moe.TERM)
        # None in evaluation, which loads this stage's own export.
        self.dense = context.upstream.get("thinker")
        if self.dense is not None:
            check_upcycling(self.dense.config(ThinkerConfig), sizes)

    @classmethod
    def find_upstream(
        cls, config: RunConfig, run: Path, with_hashes: bool = True
    ) -> dict[str, Export]:
        assert isinstance(config, ThinkerRun)
        upcycle = config.options.upcycle
        if upcycle is None:
            return {}
        return find_exports(Path(upcycle), (config.stage,), with_hashes)

    def model_config(self) -> ThinkerConfig:
        sizes = {**self.config.model.model_dump(), "vocab_size": self.tokenizer.vocab_size}
        return validate(ThinkerConfig, sizes, "section 'model'")

    def view(self) -> TextView:
        return TextView(self.tokenizer, self.config.batch.seq_len)

    def build(self) -> ThinkerTask:
        task = ThinkerTask(self.model_config())
        if self.dense is not None and torch.get_default_device().type != "meta":
            upcycle(task.thinker, self.dense.state())
        return task

    def model(self, task: ThinkerTask) -> nn.Module:
        return task.thinker

    def flop_counter(self, task: ThinkerTask) -> FlopCounter:
        return count_thinker(task.thinker, on_cpu=self.context.device.type == "cpu")

    def loss_denominators(self, batch: Batch) -> Sums:
        counts = {"loss": (batch["labels"] != IGNORE).sum().float()}
        return counts | moe.router_denominator(batch) if self.has_experts else counts

    def after_step(self, task: ThinkerTask, state: Sums, step: int) -> None:
        if task.moe is not None:
            moe.update_biases(task.moe, task.thinker, state)

    def metrics(self, ratios: dict[str, float]) -> dict[str, float]:
        metrics = moe.load_metrics(ratios)
        metrics["bits_per_byte"] = ratios["bits_per_byte"] / math.log(2)
        metrics["perplexity"] = math.exp(min(50.0, ratios["loss"]))
        return metrics
