"""Stage `codec`: speech codec with residual vector quantization."""

import torch
from torch import nn

from muomni.config.models import CodecConfig
from muomni.config.run import RunConfig
from muomni.config.stages import CodecRun
from muomni.data.views.base import Batch
from muomni.data.views.waveform import WaveformView
from muomni.distributed import collectives
from muomni.models.speech.codec import Codec, codec_loss, num_code_frames
from muomni.models.speech.mel import num_mel_frames
from muomni.models.speech.quantizer import QuantizerStatistics, code_perplexity
from muomni.training.flops import FlopCounter, count_codec
from muomni.training.outputs import StageOutput, Sums
from muomni.training.stage import Stage, StageContext


class CodecTask(nn.Module):
    """The codec and its loss."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.codec = Codec(config)

    def forward(self, batch: Batch) -> StageOutput:
        output = self.codec(batch["waveform"], batch["lengths"], batch["seeds"])
        losses, weights, logs = codec_loss(output)
        for term, total in losses.items():
            logs[term] = torch.stack([total.detach(), weights[term]])
        state = {} if output.statistics is None else output.statistics.tensors()
        return StageOutput(losses, logs, state)


class CodecStage(Stage):
    """Trains mel encoder and decoder by gradients, and the codebooks by moving averages."""

    config: CodecRun
    terms = ("reconstruction", "commitment")
    best_metric = "mel_l1"

    def __init__(self, config: RunConfig, context: StageContext) -> None:
        super().__init__(config, context)
        self._code_counts: torch.Tensor | None = None

    def model_config(self) -> CodecConfig:
        return self.config.model

    def view(self) -> WaveformView:
        return WaveformView(self.config.options.crop_s)

    def build(self) -> CodecTask:
        return CodecTask(self.model_config())

    def model(self, task: CodecTask) -> Codec:
        return task.codec

    def flop_counter(self, task: CodecTask) -> FlopCounter:
        return count_codec(task.codec)

    def loss_weights(self) -> dict[str, float]:
        return {"reconstruction": 1.0, "commitment": self.model_config().commitment_weight}

    def loss_denominators(self, batch: Batch) -> Sums:
        mel_lengths = num_mel_frames(batch["lengths"], self.model_config().mel.hop)
        num_codes = num_code_frames(mel_lengths).sum().float()
        return {"reconstruction": mel_lengths.sum().float(), "commitment": num_codes}

    def after_step(self, task: CodecTask, state: Sums, step: int) -> None:
        """Update the codebooks from the frames of all ranks, identically on each rank."""
        names = sorted(state)
        flat = collectives.sum_over_ranks(torch.cat([state[name].flatten() for name in names]))
        parts = flat.split([state[name].numel() for name in names])
        summed = {name: part.view_as(state[name]) for name, part in zip(names, parts, strict=True)}
        task.codec.quantizer.update(QuantizerStatistics(**summed))
        self._code_counts = task.codec.quantizer.ema_counts

    def metrics(self, ratios: dict[str, float]) -> dict[str, float]:
        metrics = dict(ratios)
        metrics["loss"] = sum(
            loss_weight * ratios[term] for term, loss_weight in self.loss_weights().items()
        )
        if self._code_counts is not None:
            metrics["code_perplexity"] = float(code_perplexity(self._code_counts).mean())
        return metrics
