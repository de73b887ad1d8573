"""Stage `audio_encoder`: speech recognition with CTC."""

import jiwer
import torch
from torch import Tensor, nn

from muomni.config.loading import validate
from muomni.config.models import AudioEncoderConfig, SpecAugmentConfig
from muomni.config.stages import AudioEncoderRun
from muomni.data.text.ctc_units import CtcUnits
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.base import Batch
from muomni.data.views.speech import SpeechView
from muomni.models.speech.audio_encoder import AudioEncoder, num_encoder_frames
from muomni.models.speech.ctc import ctc_loss, ctc_weight, greedy_decode
from muomni.training.flops import FlopCounter, count_audio_encoder
from muomni.training.outputs import StageOutput, Sums
from muomni.training.stage import Stage


class AudioEncoderTask(nn.Module):
    """The encoder with its CTC head and loss; in evaluation, also error counts."""

    def __init__(
        self,
        config: AudioEncoderConfig,
        augmentation: SpecAugmentConfig | None,
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__()
        self.encoder = AudioEncoder(config)
        self.augmentation = augmentation
        self.tokenizer = tokenizer

    def forward(self, batch: Batch) -> StageOutput:
        return self.score(batch, *self.logits(batch))

    def logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return CTC logits [B, T, V] and frame lengths [B] of the audio clips."""
        hidden, frame_lengths = self.encoder(
            batch["waveform"],
            batch["lengths"],
            batch["seeds"],
            self.augmentation if self.training else None,
        )
        return self.encoder.ctc_logits(hidden), frame_lengths

    def score(self, batch: Batch, logits: Tensor, frame_lengths: Tensor) -> StageOutput:
        """Return the CTC loss, and in evaluation the errors of greedy CTC decoding."""
        labels, label_lengths = batch["labels"], batch["label_lengths"]
        total, weight, logs = ctc_loss(logits, frame_lengths, labels, label_lengths)
        logs["loss"] = torch.stack([total.detach(), weight])
        if not self.training:
            references = [
                self.tokenizer.decode(ids[:length].tolist())
                for ids, length in zip(labels.cpu(), label_lengths.cpu(), strict=True)
            ]
            hypotheses = [self.tokenizer.decode(i) for i in greedy_decode(logits, frame_lengths)]
            logs |= error_sums(references, hypotheses, logits.device)
        return StageOutput({"loss": total}, logs)


def error_sums(references: list[str], hypotheses: list[str], device: torch.device) -> Sums:
    """Return `wer` and `cer` as [errors, reference length]; empty references are skipped."""
    pairs = [(r, h) for r, h in zip(references, hypotheses, strict=True) if r]
    sums = {"wer": torch.zeros(2, device=device), "cer": torch.zeros(2, device=device)}
    if pairs:
        spoken, decoded = map(list, zip(*pairs, strict=True))
        for name, process in (("wer", jiwer.process_words), ("cer", jiwer.process_characters)):
            found = process(spoken, decoded)
            errors = found.substitutions + found.deletions + found.insertions
            length = found.hits + found.substitutions + found.deletions
            sums[name] = torch.tensor([float(errors), float(length)], device=device)
    return sums


class AudioEncoderStage(Stage):
    """Trains the speech encoder on audio clips and transcripts."""

    config: AudioEncoderRun
    best_metric = "cer"

    def model_config(self) -> AudioEncoderConfig:
        sizes = {**self.config.model.model_dump(), "vocab_size": self.tokenizer.vocab_size}
        return validate(AudioEncoderConfig, sizes, "section 'model'")

    def view(self) -> SpeechView:
        units = CtcUnits(self.tokenizer, self.config.options.num_merges)
        return SpeechView(units, self.config.options.perturb_speed, self.padding)

    def build(self) -> AudioEncoderTask:
        return AudioEncoderTask(
            self.model_config(), self.config.options.spec_augment, self.tokenizer
        )

    def model(self, task: AudioEncoderTask) -> AudioEncoder:
        return task.encoder

    def flop_counter(self, task: AudioEncoderTask) -> FlopCounter:
        return count_audio_encoder(task.encoder)

    def loss_denominators(self, batch: Batch) -> Sums:
        frame_lengths = num_encoder_frames(batch["lengths"])
        return {"loss": ctc_weight(frame_lengths, batch["labels"], batch["label_lengths"])}

    def metrics(self, ratios: dict[str, float]) -> dict[str, float]:
        metrics = dict(ratios)
        metrics["infeasible_fraction"] = metrics.pop("infeasible")
        return metrics
