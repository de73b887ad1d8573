"""Stage `talker`: speech codes from text, with a learned stop.

The codes come from the frozen codec. Here the Talker sees the text alone; stage `sft` adds the Thinker's
states through a projection that starts at zero, and so begins with exactly this stage's Talker.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from muomni.config.loading import validate
from muomni.config.models import FRAME_RATE_HZ, MEL_RATE_HZ, TalkerConfig
from muomni.config.run import RunConfig
from muomni.data.sampling.plan import Batching
from muomni.data.shards.source import Source
from muomni.data.views.base import Batch
from muomni.data.views.tts import TtsView
from muomni.errors import ConfigError
from muomni.models.layers.recompute import recomputed_share
from muomni.models.speech.mel import LOG_FLOOR
from muomni.models.speech.speech_output import speak
from muomni.models.speech.talker import Talker, num_predictions
from muomni.observe.spectrogram import write_spectrograms, write_waveform
from muomni.training.flops import FlopCounter, count_talker
from muomni.training.stage import Artifact, Stage, StageContext, StageOutput, Sums
from muomni.training.stages.frozen_codec import FrozenCodec

_NUM_SAMPLE_OUTPUTS = 2


class TalkerTask(nn.Module):
    """The Talker and its loss."""

    def __init__(self, config: TalkerConfig) -> None:
        super().__init__()
        self.talker = Talker(config)

    def forward(self, batch: Batch) -> StageOutput:
        codes, code_mask = batch["codes"], batch["code_mask"]
        output = self.talker(
            batch["text_ids"], batch["character_ids"], batch["text_mask"], codes, code_mask
        )
        loss = self.talker.loss(output, codes, code_mask)
        logs = {"loss": torch.stack([loss.total.detach(), loss.weight]), **loss.logs}
        return StageOutput({"loss": loss.total}, logs)


class TalkerStage(Stage):
    """Trains the code language model."""

    name = "talker"
    tasks = ("tts",)
    upstream = ("codec",)

    def __init__(self, config: RunConfig, context: StageContext) -> None:
        super().__init__(config, context)
        self.codec = FrozenCodec(context.upstream["codec"], context.device)
        sizes = self.model_config()
        if sizes.num_speakers or sizes.thinker_hidden_size:
            raise ConfigError(
                "stage talker trains one voice on text alone; leave model.num_speakers and "
                "model.thinker_hidden_size out (stage sft adds the Thinker's states)"
            )

    def model_config(self) -> TalkerConfig:
        sizes = {
            **self.config.model,
            "text_vocab_size": self.tokenizer.vocab_size,
            "num_codebooks": self.codec.config.num_codebooks,
            "codebook_size": self.codec.config.codebook_size,
        }
        return validate(TalkerConfig, sizes, "section 'model'")

    def view(self) -> TtsView:
        return TtsView(self.tokenizer)

    def batching(self) -> Batching:
        batch = self.config.batch
        return Batching("bucket", batch.size * MEL_RATE_HZ, shuffle_window=batch.window)

    def build(self) -> TalkerTask:
        return TalkerTask(self.model_config())

    def model(self, task: TalkerTask) -> nn.Module:
        return task.talker

    def flop_counter(self, task: TalkerTask) -> FlopCounter:
        by_documents = task.talker.stack.attends_by_documents
        return count_talker(
            self.model_config(), self.codec.config, recomputed_share(task), by_documents
        )

    def frozen_models(self) -> list[nn.Module]:
        return [self.codec.codec]

    def prepare(self, batch: Batch) -> Batch:
        return {**batch, **self.codec.encode(batch["waveform"], batch["lengths"])}

    def weights(self, batch: Batch) -> Sums:
        return {"loss": num_predictions(batch["code_mask"], self.codec.config.num_codebooks)}

    def metrics(self, ratios: dict[str, float]) -> dict[str, float]:
        accuracies = [ratios[f"accuracy_{k}"] for k in range(self.codec.config.num_codebooks)]
        return {**ratios, "accuracy": sum(accuracies) / len(accuracies)}

    def sample_outputs(self, task: TalkerTask, source: Source, folder: Path) -> Iterator[Artifact]:
        """Speak the first held-out texts; each image holds the audio clip's and the made mel."""
        codec, view, device = self.codec.codec, self.view(), self.context.device
        for index in range(min(_NUM_SAMPLE_OUTPUTS, len(source))):
            batch = view.collate([[view.example(source.read(index), None)]])
            waveform, lengths = batch["waveform"].to(device), batch["lengths"].to(device)
            target, _ = codec.log_mel(waveform, lengths)
            max_frames = 2 * target.shape[1] * FRAME_RATE_HZ // MEL_RATE_HZ + FRAME_RATE_HZ
            text = [batch[name][0].to(device) for name in ("text_ids", "character_ids")]
            speech = speak(task.talker, codec, *text, max_frames=max_frames)
            image, sound = folder / f"talker_{index}.png", folder / f"talker_{index}.wav"
            mels = [mel.cpu().numpy() for mel in (target[0], speech.mel) if len(mel)]
            write_spectrograms(image, mels, LOG_FLOOR)
            yield Artifact(image, "image")
            write_waveform(sound, speech.waveform.cpu().numpy())
            yield Artifact(sound, "audio")
