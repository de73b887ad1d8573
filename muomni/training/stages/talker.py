"""Stage `talker`: language model over codec codes, conditioned on text, with a learned stop.

The codes come from the frozen codec. Stage `sft` adds the Thinker's states through a zero-initialized
projection, so it starts from exactly this stage's Talker.
"""

import torch
from torch import nn

from muomni.config.loading import validate
from muomni.config.models import TalkerConfig
from muomni.config.run import RunConfig
from muomni.config.stages import TalkerRun
from muomni.data.views.base import Batch
from muomni.data.views.tts import TtsView
from muomni.models.speech.talker import Talker, num_predictions
from muomni.training.flops import FlopCounter, count_talker
from muomni.training.outputs import StageOutput, Sums
from muomni.training.stage import Stage, StageContext
from muomni.training.stages.frozen_codec import FrozenCodec


class TalkerTask(nn.Module):
    """The Talker and its loss."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.talker = Talker(config)

    def forward(self, batch: Batch) -> StageOutput:
        codes, code_mask = batch["codes"], batch["code_mask"]
        text = [batch[name] for name in ("text_ids", "character_ids", "text_mask")]
        output = self.talker(*text, codes, code_mask, seeds=batch["seeds"])
        loss = self.talker.loss(output, codes, code_mask)
        logs = {"loss": torch.stack([loss.total.detach(), loss.weight]), **loss.logs}
        return StageOutput({"loss": loss.total}, logs)


class TalkerStage(Stage):
    """Trains the code language model."""

    config: TalkerRun

    def __init__(self, config: RunConfig, context: StageContext) -> None:
        super().__init__(config, context)
        self.codec = FrozenCodec(context.upstream["codec"], context.device)

    def model_config(self) -> TalkerConfig:
        sizes = {
            **self.config.model.model_dump(),
            "text_vocab_size": self.tokenizer.vocab_size,
            "num_codebooks": self.codec.config.num_codebooks,
            "codebook_size": self.codec.config.codebook_size,
        }
        return validate(TalkerConfig, sizes, "section 'model'")

    def view(self) -> TtsView:
        return TtsView(self.tokenizer, self.padding)

    def build(self) -> TalkerTask:
        return TalkerTask(self.model_config())

    def model(self, task: TalkerTask) -> nn.Module:
        return task.talker

    def flop_counter(self, task: TalkerTask) -> FlopCounter:
        return count_talker(task.talker, self.codec.codec)

    def frozen_models(self) -> list[nn.Module]:
        return [self.codec.codec]

    def prepare(self, batch: Batch) -> Batch:
        return {**batch, **self.codec.encode(batch["waveform"], batch["lengths"])}

    def loss_denominators(self, batch: Batch) -> Sums:
        return {"loss": num_predictions(batch["code_mask"], self.codec.config.num_codebooks)}

    def metrics(self, ratios: dict[str, float]) -> dict[str, float]:
        accuracies = [ratios[f"accuracy_{k}"] for k in range(self.codec.config.num_codebooks)]
        return {**ratios, "accuracy": sum(accuracies) / len(accuracies)}
