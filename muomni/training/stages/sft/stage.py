"""Stage `sft`: conversations with images and audio clips, answered in text and speech.

It joins the exports of all other stages into one omni model. The text loss of answers trains the Thinker, the
projectors, and encoders that are not frozen. The code loss of spoken answers trains the Talker, which sees the
Thinker's states through a zero-initialized projection.
"""

import math

import torch
from torch import nn

from muomni.checkpoint.export import Export
from muomni.config.models import OmniConfig
from muomni.config.stages import SftRun
from muomni.data.views.base import Batch
from muomni.data.views.conversation import ConversationView
from muomni.data.views.text import IGNORE
from muomni.models.omni import OmniModel
from muomni.models.speech.talker import num_predictions
from muomni.training import moe
from muomni.training.flops import FlopCounter
from muomni.training.outputs import Sums
from muomni.training.stage import Stage, StageContext
from muomni.training.stages.frozen_codec import FrozenCodec
from muomni.training.stages.sft.flops import count_omni
from muomni.training.stages.sft.parts import check_sizes, freeze, load_parts, omni_config
from muomni.training.stages.sft.task import OmniTask

_CODEC_PREFIX = "codec."
# Metrics that are undefined if a split or logging interval lacks the modality.
_OPTIONAL = ("image_", "audio_", "speech_", "exact_")


class SftStage(Stage):
    """Fine-tunes the joined model on conversations."""

    config: SftRun
    terms = ("answer", "speech")
    exports_upstream = True

    def __init__(self, config: SftRun, context: StageContext) -> None:
        super().__init__(config, context)
        check_sizes(config, context.upstream)
        self.sizes = omni_config(config, context.upstream, self.config.options.talker_sees_thinker)
        self.codec = FrozenCodec(context.upstream["codec"], context.device)
        self.has_experts = self.sizes.thinker.moe is not None
        if self.has_experts:
            self.terms = (*self.terms, moe.TERM)
        with torch.device("meta"):  # reports invalid patterns before training starts
            freeze(OmniModel(self.sizes), self.config.options.freeze)

    def model_config(self) -> OmniConfig:
        return self.sizes

    def view(self) -> ConversationView:
        seq_len = self.config.batch.seq_len
        return ConversationView(self.tokenizer, self.sizes, seq_len, self.padding)

    def build(self) -> OmniTask:
        task = OmniTask(self.sizes, self.config.options.spec_augment)
        freeze(task.omni, self.config.options.freeze)
        if torch.get_default_device().type != "meta":  # a dry run needs sizes only
            load_parts(task.omni, self.context.upstream)
        return task

    def model(self, task: OmniTask) -> OmniModel:
        return task.omni

    def flop_counter(self, task: OmniTask) -> FlopCounter:
        on_cpu = self.context.device.type == "cpu"
        return count_omni(task.omni, self.codec.codec, on_cpu=on_cpu)

    def frozen_state(self) -> dict[str, torch.Tensor]:
        state = self.codec.codec.state_dict()
        return {f"{_CODEC_PREFIX}{name}": tensor.cpu() for name, tensor in state.items()}

    def frozen_models(self) -> list[nn.Module]:
        return [self.codec.codec]

    def load_export(self, task: nn.Module, export: Export) -> None:
        omni = OmniModel(self.sizes, with_codec=True)
        export.load_into(omni)
        assert isinstance(task, OmniTask) and omni.codec is not None
        self.codec.replace(omni.codec)
        state = omni.state_dict()
        own = {name: t for name, t in state.items() if not name.startswith(_CODEC_PREFIX)}
        task.omni.load_state_dict(own)

    # -- one step ----------------------------------------------------------------------------------
    def loss_weights(self) -> dict[str, float]:
        weights = {
            "answer": self.config.options.answer_weight,
            "speech": self.config.options.speech_weight,
        }
        return {**dict.fromkeys(self.terms, 1.0), **weights}

    def prepare(self, batch: Batch) -> Batch:
        return {**batch, **self.codec.encode(batch["speech"], batch["speech_lengths"])}

    def loss_denominators(self, batch: Batch) -> Sums:
        num_codebooks = self.codec.config.num_codebooks
        counts = {
            "answer": (batch["labels"] != IGNORE).sum().float(),
            "speech": num_predictions(batch["code_mask"], num_codebooks),
        }
        return counts | moe.router_denominator(batch) if self.has_experts else counts

    def after_step(self, task: OmniTask, state: Sums, step: int) -> None:
        if task.moe is not None:
            moe.update_biases(task.moe, task.omni.thinker, state)

    # -- results -----------------------------------------------------------------------------------
    def metrics(self, ratios: dict[str, float]) -> dict[str, float]:
        """Add the optimized loss, and drop the metrics of absent modalities."""
        metrics = moe.load_metrics(ratios)
        weights = self.loss_weights()
        metrics["loss"] = weights["answer"] * metrics["answer_loss"]
        if metrics.pop("speech_predictions") > 0:
            metrics["loss"] += weights["speech"] * metrics["speech_loss"]
        return {
            name: value
            for name, value in metrics.items()
            if not (name.startswith(_OPTIONAL) and math.isnan(value))
        }
