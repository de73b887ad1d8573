"""The table of stages, the only place where commands, pipeline, and Slurm look up a stage.

A new stage needs a row here, a config class, a recipe, a view, a stage class, and an evaluator
(CONTRIBUTING.md). Rows refer to code as `module:attribute`, imported on use, so the table needs no torch.
"""

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from muomni.config.names import RECIPES
from muomni.config.run import RunConfig, Task
from muomni.config.stages import (
    AudioEncoderRun,
    CodecRun,
    SftRun,
    TalkerRun,
    ThinkerRun,
    VisionEncoderRun,
)
from muomni.errors import ConfigError, did_you_mean


@dataclass(frozen=True, slots=True)
class StageSpec:
    """A row of the table.

    `tasks` are the dataset tasks that the stage reads, `upstream` the stages whose exports it
    loads. The other strings name something as `module:attribute`: the classes of stage and view, the
    function that evaluates an export, the function that writes sample outputs of it, and the
    `CountedModel` of `muomni count`. A stage may have no samples and no count.
    """

    name: str
    summary: str
    config: type[RunConfig]
    tasks: tuple[Task, ...]
    upstream: tuple[str, ...]
    stage: str
    view: str
    evaluate: str
    recipe: Path
    samples: str | None = None
    count: str | None = None


def _row(
    name: str,
    summary: str,
    config: type[RunConfig],
    tasks: tuple[Task, ...],
    stage: str,
    view: str,
    count: str,
    samples: str | None = None,
    upstream: tuple[str, ...] = (),
) -> StageSpec:
    return StageSpec(
        name=name,
        summary=summary,
        config=config,
        tasks=tasks,
        upstream=upstream,
        stage=f"muomni.training.stages.{stage}",
        view=f"muomni.data.views.{view}",
        evaluate=f"muomni.evaluation.stages.{name}:evaluate",
        recipe=RECIPES / f"{name}.yaml",
        samples=samples and f"muomni.inference.stage_samples:{samples}",
        count=f"muomni.training.planning.model_counts:{count}",
    )


_ROWS = (
    _row(
        "thinker", "decoder language model", ThinkerRun, ("text",),
        "thinker:ThinkerStage", "text:TextView", "THINKER", "write_continuations",
    ),
    _row(
        "audio_encoder", "speech encoder, trained with CTC", AudioEncoderRun, ("speech",),
        "audio_encoder:AudioEncoderStage", "speech:SpeechView", "AUDIO_ENCODER", "write_transcripts",
    ),
    _row(
        "vision_encoder", "contrastive image-text pretraining", VisionEncoderRun, ("image-caption",),
        "vision_encoder:VisionEncoderStage", "image_text:ImageTextView", "VISION_ENCODER", "write_neighbors",
    ),
    _row(
        "codec", "speech codec with residual vector quantization", CodecRun, ("speech", "tts"),
        "codec:CodecStage", "waveform:WaveformView", "CODEC", "write_reconstructions",
    ),
    _row(
        "talker", "language model over codec codes", TalkerRun, ("tts",),
        "talker:TalkerStage", "tts:TtsView", "TALKER", "write_spoken_texts", upstream=("codec",),
    ),
    _row(
        "sft", "joint fine-tuning of all parts on conversations", SftRun, ("sft",),
        "sft.stage:SftStage", "conversation:ConversationView", "OMNI", "write_answers",
        upstream=("thinker", "audio_encoder", "vision_encoder", "codec", "talker"),
    ),
)  # fmt: skip

# By name, in dependency order.
STAGES: dict[str, StageSpec] = {row.name: row for row in _ROWS}


def stage_spec(name: str) -> StageSpec:
    """Return the row of a stage; raises ConfigError for an unknown name."""
    if name not in STAGES:
        hint = did_you_mean(name, tuple(STAGES))
        raise ConfigError(f"unknown stage '{name}'{hint}; stages: {', '.join(STAGES)}")
    return STAGES[name]


def load(reference: str) -> Any:
    """Import and return the object at `module:attribute`."""
    module, _, attribute = reference.partition(":")
    return getattr(import_module(module), attribute)
