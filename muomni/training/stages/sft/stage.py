"""Stage `sft`: conversations with images and audio clips, answered in text and speech.

It joins the exports of all other stages into one omni model. The loss of the answers' text trains Thinker
and projectors (and towers that are not frozen), the codes of spoken answers train the Talker, which now
sees the Thinker's states through a projection that starts at zero.
"""

import math
from collections.abc import Iterator
from pathlib import Path

import torch
from pydantic import Field
from torch import nn

from muomni.checkpoint.export import Export
from muomni.config.models import FRAME_RATE_HZ, OmniConfig, Section
from muomni.config.run import RunConfig
from muomni.data.sampling.plan import Batching
from muomni.data.shards.source import Source
from muomni.data.text.turns import read_turns
from muomni.data.views.base import Batch
from muomni.data.views.conversation import ConversationView, media_slots
from muomni.data.views.text import IGNORE
from muomni.models.omni import MediaSlots, OmniModel
from muomni.models.speech.mel import LOG_FLOOR
from muomni.models.speech.specaugment import SpecAugmentConfig
from muomni.models.speech.speech_output import speak
from muomni.models.speech.talker import num_predictions
from muomni.observe.spectrogram import write_spectrograms, write_waveform
from muomni.training import moe
from muomni.training.flops import FlopCounter
from muomni.training.stage import Artifact, Stage, StageContext, Sums
from muomni.training.stages.frozen_codec import FrozenCodec
from muomni.training.stages.sft.flops import count_omni
from muomni.training.stages.sft.parts import check_sizes, freeze, load_parts, omni_config
from muomni.training.stages.sft.task import OmniTask

_NUM_SAMPLE_OUTPUTS = 8
_MAX_SAMPLE_TOKENS = 64
_MAX_SAMPLE_FRAMES = 10 * FRAME_RATE_HZ
_CODEC_PREFIX = "codec."
# Metrics of what a split or a stretch of training may lack.
_OPTIONAL = ("image_", "audio_", "speech_", "exact_")


class SftOptions(Section):
    """Settings of the stage besides the model's sizes."""

    freeze: tuple[str, ...] = Field(
        ("vision_encoder.*", "audio_encoder.*"),
        description="patterns of parameter names that are not trained",
    )
    answer_weight: float = Field(1.0, ge=0, description="of the loss of the answers' text")
    speech_weight: float = Field(
        0.1,
        ge=0,
        description="of the loss of spoken answers' codes; much of it disturbs the Thinker",
    )
    talker_sees_thinker: bool = Field(True, description="give the Thinker's states to the Talker")
    spec_augment: SpecAugmentConfig | None = Field(
        SpecAugmentConfig(), description="bands and stretches of audio clips to hide; null: none"
    )


class SftStage(Stage):
    """Fine-tunes the joined model on conversations."""

    name = "sft"
    tasks = ("sft",)
    upstream = ("thinker", "audio_encoder", "vision_encoder", "codec", "talker")
    terms = ("answer", "speech")
    options_type = SftOptions

    def __init__(self, config: RunConfig, context: StageContext) -> None:
        super().__init__(config, context)
        check_sizes(config, context.upstream)
        self.sizes = omni_config(config, context.upstream, self.options.talker_sees_thinker)
        self.codec = FrozenCodec(context.upstream["codec"], context.device)
        self.has_experts = self.sizes.thinker.moe is not None
        if self.has_experts:
            self.terms = (*self.terms, moe.TERM)
        with torch.device("meta"):  # a pattern that names nothing is refused before any start
            freeze(OmniModel(self.sizes), self.options.freeze)

    def model_config(self) -> OmniConfig:
        return self.sizes

    def view(self) -> ConversationView:
        batch = self.config.batch
        return ConversationView(self.tokenizer, self.sizes, batch.size, batch.rows)

    def batching(self) -> Batching:
        batch = self.config.batch
        return Batching("pack", batch.size, num_sequences=batch.rows, shuffle_window=batch.window)

    def build(self) -> OmniTask:
        task = OmniTask(self.sizes, self.options.spec_augment)
        freeze(task.omni, self.options.freeze)
        if torch.get_default_device().type != "meta":  # a dry run asks for sizes only
            load_parts(task.omni, self.context.upstream)
        return task

    def model(self, task: OmniTask) -> OmniModel:
        return task.omni

    def flop_counter(self, task: OmniTask) -> FlopCounter:
        on_cpu = self.context.device.type == "cpu"
        return count_omni(task.omni, self.codec.config, on_cpu=on_cpu)

    def frozen_state(self) -> dict[str, torch.Tensor]:
        state = self.codec.codec.state_dict()
        return {f"{_CODEC_PREFIX}{name}": tensor.cpu() for name, tensor in state.items()}

    def frozen_models(self) -> list[nn.Module]:
        return [self.codec.codec]

    def load_export(self, task: nn.Module, export: Export) -> None:
        whole = OmniModel(self.sizes, with_codec=True)
        export.load_into(whole)
        assert isinstance(task, OmniTask) and whole.codec is not None
        self.codec.replace(whole.codec)
        state = whole.state_dict()
        own = {name: t for name, t in state.items() if not name.startswith(_CODEC_PREFIX)}
        task.omni.load_state_dict(own)

    # -- one step ----------------------------------------------------------------------------------
    def loss_weights(self) -> dict[str, float]:
        weights = {"answer": self.options.answer_weight, "speech": self.options.speech_weight}
        return {**dict.fromkeys(self.terms, 1.0), **weights}

    def prepare(self, batch: Batch) -> Batch:
        return {**batch, **self.codec.encode(batch["speech"], batch["speech_lengths"])}

    def weights(self, batch: Batch) -> Sums:
        num_codebooks = self.codec.config.num_codebooks
        weights = {
            "answer": (batch["labels"] != IGNORE).sum().float(),
            "speech": num_predictions(batch["code_mask"], num_codebooks),
        }
        return weights | moe.router_weight(batch) if self.has_experts else weights

    def after_step(self, task: OmniTask, state: Sums, step: int) -> None:
        if task.moe is not None:
            moe.update_biases(task.moe, task.omni.thinker, state)

    # -- results -----------------------------------------------------------------------------------
    def metrics(self, ratios: dict[str, float]) -> dict[str, float]:
        """Loss as it is optimized; metrics of what did not occur are left out."""
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

    def sample_outputs(self, task: OmniTask, source: Source, folder: Path) -> Iterator[Artifact]:
        """Answers to held-out questions, and the first spoken one as WAV and spectrogram."""
        indices = range(0, len(source), max(1, len(source) // _NUM_SAMPLE_OUTPUTS))
        lines = [self._answer(task, source.read(index)) for index in indices[:_NUM_SAMPLE_OUTPUTS]]
        path = folder / "sft.txt"
        path.write_text("\n".join(lines), encoding="utf-8")
        yield Artifact(path, "text")
        yield from self._speak(task, source, folder)

    def _answer(self, task: OmniTask, sample: dict) -> str:
        turns = read_turns(sample)
        encoder = self.view().encoder
        prompt = encoder.prompt(turns[:-1], sample)
        ids = torch.tensor([prompt.ids], device=self.context.device)
        slots = media_slots([(0, prompt)], encoder, len(prompt.ids))
        slots = MediaSlots.of_batch({k: v.to(self.context.device) for k, v in slots.items()})
        (made,) = task.omni.generate(
            ids, slots, eos_id=self.tokenizer.eos_id, max_new_tokens=_MAX_SAMPLE_TOKENS
        )
        asked = " ".join(p.value if p.kind == "text" else f"<{p.kind}>" for p in turns[-2].parts)
        expected = self.tokenizer.decode(encoder.answer_ids(turns[-1]))
        answered = self.tokenizer.decode(made.ids)
        return f"asked:    {asked}\nexpected: {expected}\nanswered: {answered}\n"

    def _speak(self, task: OmniTask, source: Source, folder: Path) -> Iterator[Artifact]:
        """Speak the first spoken answer of the split from its text and the states at it."""
        view = self.view()
        for index in range(len(source)):
            sample = source.read(index)
            if not any(p.kind == "audio" for t in read_turns(sample)[1:] for p in t.parts):
                continue
            batch = view.collate([[view.example(sample, None)]])
            if not bool(batch["speech_text_mask"].any()):
                continue
            batch = {key: value.to(self.context.device) for key, value in batch.items()}
            mask = batch["speech_text_mask"][0]
            text = [batch[f"speech_{name}"][0][mask] for name in ("text_ids", "character_ids")]
            hidden = task.states_at_speech(batch)[:1, mask] if task.sees_thinker else None
            codec = self.codec.codec
            assert task.omni.talker is not None
            speech = speak(
                task.omni.talker, codec, *text, max_frames=_MAX_SAMPLE_FRAMES,
                thinker_hidden=hidden,
            )  # fmt: skip
            image, sound = folder / "sft_speech.png", folder / "sft_speech.wav"
            target, _ = codec.log_mel(batch["speech"][:1], batch["speech_lengths"][:1])
            mels = [mel.cpu().numpy() for mel in (target[0], speech.mel) if len(mel)]
            write_spectrograms(image, mels, LOG_FLOOR)
            yield Artifact(image, "image")
            write_waveform(sound, speech.waveform.cpu().numpy())
            yield Artifact(sound, "audio")
            return
