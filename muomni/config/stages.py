"""The run config of each stage: batch sizes, model sizes, and options.

Must not import torch, so that a wrong key is reported at once.
"""

from typing import Annotated, Literal

from pydantic import Field

from muomni.config.models import (
    AudioEncoderSizes,
    Augmentation,
    ClipSizes,
    CodecConfig,
    OmniSizes,
    Section,
    SpecAugmentConfig,
    TalkerSizes,
    ThinkerSizes,
)
from muomni.config.run import DurationBatch, NoOptions, PackedBatch, RunConfig, SampleBatch
from muomni.config.values import FromList, PathText


class ThinkerOptions(Section):
    """Options of stage `thinker`."""

    upcycle: PathText | None = Field(
        default=None,
        description="run folder of a dense Thinker; each expert is initialized from its MLP",
    )


class ThinkerRun(RunConfig):
    """Config of stage `thinker`."""

    batch: PackedBatch
    model: ThinkerSizes
    options: ThinkerOptions = ThinkerOptions()


class AudioEncoderOptions(Section):
    """Options of stage `audio_encoder`."""

    num_merges: int | None = Field(
        default=None,
        ge=0,
        description="tokenizer merges used for CTC labels; 0: characters, null: all",
    )
    perturb_speed: bool = Field(
        default=True, description="speed perturbation: factors 0.9, 1.0, and 1.1"
    )
    spec_augment: SpecAugmentConfig | None = Field(
        default=SpecAugmentConfig(), description="SpecAugment masks in training; null: none"
    )


class AudioEncoderRun(RunConfig):
    """Config of stage `audio_encoder`."""

    batch: DurationBatch
    model: AudioEncoderSizes
    options: AudioEncoderOptions = AudioEncoderOptions()


class VisionEncoderOptions(Section):
    """Options of stage `vision_encoder`."""

    loss: Literal["clip", "siglip"] = Field(
        default="clip",
        description="clip: softmax over all pairs of a step (InfoNCE); siglip: sigmoid per pair",
    )
    augmentation: Augmentation | None = Field(
        default=Augmentation(), description="image augmentation in training; null: none"
    )


class VisionEncoderRun(RunConfig):
    """Config of stage `vision_encoder`."""

    batch: SampleBatch
    model: ClipSizes
    options: VisionEncoderOptions = VisionEncoderOptions()


class CodecOptions(Section):
    """Options of stage `codec`."""

    crop_s: float = Field(default=2.0, ge=0.1, le=3600, description="seconds per training crop")


class CodecRun(RunConfig):
    """Config of stage `codec`."""

    batch: SampleBatch
    model: CodecConfig = CodecConfig()
    options: CodecOptions = CodecOptions()


class TalkerRun(RunConfig):
    """Config of stage `talker`."""

    batch: DurationBatch
    model: TalkerSizes
    options: NoOptions = NoOptions()


class SftOptions(Section):
    """Options of stage `sft`."""

    freeze: Annotated[tuple[str, ...], FromList] = Field(
        default=("vision_encoder.*", "audio_encoder.*"),
        description="name patterns of parameters that are not trained",
    )
    answer_weight: float = Field(default=1.0, ge=0, description="loss weight of the answers' text")
    speech_weight: float = Field(
        default=0.1,
        ge=0,
        description="loss weight of the codes of spoken answers; large values degrade the Thinker",
    )
    talker_sees_thinker: bool = Field(default=True, description="feed Thinker states to the Talker")
    spec_augment: SpecAugmentConfig | None = Field(
        default=SpecAugmentConfig(), description="SpecAugment masks in training; null: none"
    )


class SftRun(RunConfig):
    """Config of stage `sft`."""

    batch: PackedBatch
    model: OmniSizes = OmniSizes()
    options: SftOptions = SftOptions()
