"""Stage `codec`: speech to discrete codes and back."""

from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import Field
from torch import nn

from muomni.config.loading import validate
from muomni.config.models import CodecConfig, Section
from muomni.config.run import RunConfig
from muomni.data.media.audio import pad_waveforms, read_audio
from muomni.data.sampling.plan import Batching
from muomni.data.shards.source import Source
from muomni.data.views.base import Batch
from muomni.data.views.waveform import WaveformView
from muomni.distributed import collectives
from muomni.models.layers.recompute import recomputed_share
from muomni.models.speech.codec import Codec, codec_loss, num_code_frames
from muomni.models.speech.mel import LOG_FLOOR, num_mel_frames
from muomni.models.speech.quantizer import QuantizerStatistics, code_perplexity
from muomni.models.speech.vocoder import mel_to_waveform
from muomni.observe.spectrogram import write_spectrograms, write_waveform
from muomni.training.flops import FlopCounter, count_codec
from muomni.training.stage import Artifact, Stage, StageContext, StageOutput, Sums

_NUM_SAMPLE_OUTPUTS = 2


class CodecOptions(Section):
    """Settings of the stage besides the model's sizes."""

    crop_s: float = Field(2.0, gt=0, description="seconds of each audio clip that a step sees")


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
    """Trains mel encoder and decoder by gradient, and the codebooks by moving averages."""

    name = "codec"
    tasks = ("speech", "tts")
    terms = ("reconstruction", "commitment")
    options_type = CodecOptions
    best_metric = "mel_l1"

    def __init__(self, config: RunConfig, context: StageContext) -> None:
        super().__init__(config, context)
        self._code_counts: torch.Tensor | None = None

    def model_config(self) -> CodecConfig:
        return validate(CodecConfig, self.config.model, "section 'model'")

    def view(self) -> WaveformView:
        return WaveformView(self.options.crop_s)

    def batching(self) -> Batching:
        return Batching("fixed", self.config.batch.size, shuffle_window=self.config.batch.window)

    def build(self) -> CodecTask:
        return CodecTask(self.model_config())

    def model(self, task: CodecTask) -> Codec:
        return task.codec

    def flop_counter(self, task: nn.Module) -> FlopCounter:
        return count_codec(self.model_config(), recomputed_share(task))

    def loss_weights(self) -> dict[str, float]:
        return {"reconstruction": 1.0, "commitment": self.model_config().commitment_weight}

    def weights(self, batch: Batch) -> Sums:
        mel_lengths = num_mel_frames(batch["lengths"], self.model_config().mel.hop)
        num_codes = num_code_frames(mel_lengths).sum().float()
        return {"reconstruction": mel_lengths.sum().float(), "commitment": num_codes}

    def after_step(self, task: CodecTask, state: Sums, step: int) -> None:
        """Move the codebooks by the frames of the whole step, on each rank alike."""
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

    def sample_outputs(self, task: CodecTask, source: Source, folder: Path) -> Iterator[Artifact]:
        codec = task.codec
        for index in range(min(_NUM_SAMPLE_OUTPUTS, len(source))):
            waveform, lengths = pad_waveforms([read_audio(source.read(index))])
            waveform, lengths = waveform.to(self.context.device), lengths.to(self.context.device)
            target, _ = codec.log_mel(waveform, lengths)
            codes, _ = codec.encode(waveform, lengths)
            mel = codec.decode(codes)[0, : target.shape[1]]
            image, sound = folder / f"codec_{index}.png", folder / f"codec_{index}.wav"
            mels = [target[0].cpu().numpy(), mel.cpu().numpy()]
            write_spectrograms(image, mels, LOG_FLOOR)
            yield Artifact(image, "image")
            write_waveform(sound, mel_to_waveform(mel, codec.config.mel).cpu().numpy())
            yield Artifact(sound, "audio")
