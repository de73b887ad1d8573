"""Stage `audio_encoder`: speech recognition by CTC, which teaches the encoder what is said."""

from collections.abc import Iterator
from pathlib import Path

import jiwer
import torch
from pydantic import Field
from torch import Tensor, nn

from muomni.config.loading import validate
from muomni.config.models import MEL_RATE_HZ, AudioEncoderConfig, Section
from muomni.data.sampling.plan import Batching
from muomni.data.shards.source import Source
from muomni.data.text.ctc_units import CtcUnits
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.base import Batch
from muomni.data.views.speech import SpeechView
from muomni.models.layers.recompute import recomputed_share
from muomni.models.speech.audio_encoder import AudioEncoder, num_encoder_frames
from muomni.models.speech.ctc import ctc_loss, ctc_weight, greedy_decode
from muomni.models.speech.specaugment import SpecAugmentConfig
from muomni.training.flops import FlopCounter, count_audio_encoder
from muomni.training.stage import Artifact, Stage, StageOutput, Sums

_NUM_SAMPLE_OUTPUTS = 8


class AudioEncoderOptions(Section):
    """Settings of the stage besides the model's sizes."""

    num_merges: int | None = Field(
        None, ge=0, description="merges of the tokenizer that labels use; 0: characters, null: all"
    )
    perturb_speed: bool = Field(
        True, description="play audio clips at 0.9, 1 or 1.1 times the speed"
    )
    spec_augment: SpecAugmentConfig | None = Field(
        SpecAugmentConfig(), description="bands and stretches to hide in training; null: none"
    )


class AudioEncoderTask(nn.Module):
    """The encoder with its CTC head and loss; in evaluation it counts errors, too."""

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
        return self.score(batch, *self.listen(batch))

    def listen(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """CTC logits [B, T, V] of the audio clips and their frame lengths [B]."""
        hidden, frame_lengths = self.encoder(
            batch["waveform"],
            batch["lengths"],
            batch["seeds"],
            self.augmentation if self.training else None,
        )
        return self.encoder.ctc_logits(hidden), frame_lengths

    def score(self, batch: Batch, logits: Tensor, frame_lengths: Tensor) -> StageOutput:
        """The loss of what `listen` returned, and in evaluation the errors of the best path."""
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
    """Word and character errors as [errors, reference length]; empty references do not count."""
    pairs = [(r, h) for r, h in zip(references, hypotheses, strict=True) if r]
    sums = {"wer": torch.zeros(2, device=device), "cer": torch.zeros(2, device=device)}
    if pairs:
        spoken, heard = map(list, zip(*pairs, strict=True))
        for name, process in (("wer", jiwer.process_words), ("cer", jiwer.process_characters)):
            found = process(spoken, heard)
            errors = found.substitutions + found.deletions + found.insertions
            length = found.hits + found.substitutions + found.deletions
            sums[name] = torch.tensor([float(errors), float(length)], device=device)
    return sums


class AudioEncoderStage(Stage):
    """Trains the speech encoder on audio clips and transcripts."""

    name = "audio_encoder"
    tasks = ("speech",)
    options_type = AudioEncoderOptions
    best_metric = "cer"

    def model_config(self) -> AudioEncoderConfig:
        sizes = {**self.config.model, "vocab_size": self.tokenizer.vocab_size}
        return validate(AudioEncoderConfig, sizes, "section 'model'")

    def view(self) -> SpeechView:
        units = CtcUnits(self.tokenizer, self.options.num_merges)
        return SpeechView(units, self.options.perturb_speed)

    def batching(self) -> Batching:
        batch = self.config.batch
        return Batching("bucket", batch.size * MEL_RATE_HZ, shuffle_window=batch.window)

    def build(self) -> AudioEncoderTask:
        return AudioEncoderTask(self.model_config(), self.options.spec_augment, self.tokenizer)

    def model(self, task: AudioEncoderTask) -> AudioEncoder:
        return task.encoder

    def flop_counter(self, task: AudioEncoderTask) -> FlopCounter:
        by_documents = task.encoder.stack.attends_by_documents
        return count_audio_encoder(self.model_config(), recomputed_share(task), by_documents)

    def weights(self, batch: Batch) -> Sums:
        frame_lengths = num_encoder_frames(batch["lengths"])
        return {"loss": ctc_weight(frame_lengths, batch["labels"], batch["label_lengths"])}

    def metrics(self, ratios: dict[str, float]) -> dict[str, float]:
        metrics = dict(ratios)
        metrics["infeasible_fraction"] = metrics.pop("infeasible")
        return metrics

    def sample_outputs(
        self, task: AudioEncoderTask, source: Source, folder: Path
    ) -> Iterator[Artifact]:
        view, lines = self.view(), []
        for index in range(min(_NUM_SAMPLE_OUTPUTS, len(source))):
            utterance = view.example(source.read(index), None)
            batch = view.collate([[utterance]])
            device = self.context.device
            hidden, lengths = task.encoder(
                batch["waveform"].to(device), batch["lengths"].to(device)
            )
            (ids,) = greedy_decode(task.encoder.ctc_logits(hidden), lengths)
            spoken, heard = self.tokenizer.decode(utterance.labels), self.tokenizer.decode(ids)
            lines.append(f"spoken: {spoken}\nheard:  {heard}\n")
        path = folder / "audio_encoder.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        yield Artifact(path, "text")
