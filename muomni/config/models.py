"""Typed model sizes, used in run configs and stored in exports to rebuild the model.

Counts are `num_*`, widths `*_size`, rates `*_hz`. Must not import torch.
"""

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, create_model, model_validator

from muomni.config.values import Count, Fraction, Positive

# Beyond these, not even the memory of a model can be predicted in reasonable time.
Width = Annotated[int, Field(gt=0, le=2**20)]
Depth = Annotated[int, Field(gt=0, le=1024)]
RopeTheta = Annotated[float, Field(ge=1)]
NormEps = Annotated[float, Field(gt=0, lt=1)]

# Encoder and codec share a frame rate: 100 mel frames per second, subsampled by 4.
SAMPLE_RATE_HZ = 16_000
MEL_HOP = 160
MEL_RATE_HZ = SAMPLE_RATE_HZ // MEL_HOP
FRAME_SUBSAMPLING = 4
FRAME_RATE_HZ = MEL_RATE_HZ // FRAME_SUBSAMPLING
FRAME_HOP = MEL_HOP * FRAME_SUBSAMPLING
# Speech codes are sampled: greedy decoding ends in endless loops of silence.
SPEECH_TEMPERATURE = 0.7


class Record(BaseModel):
    """Base of everything that is stored as JSON or YAML: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Section(Record):
    """Base of all config sections, which users write.

    Types are strict: `true` and `"1"` are no numbers, and floats are finite.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class MoEConfig(Section):
    """Mixture of experts in place of every feed-forward layer (dropless, softmax top-k)."""

    num_experts: Depth
    num_experts_per_token: Depth
    expert_intermediate_size: Width
    shared_intermediate_size: Width | None = Field(
        default=None, description="size of a shared expert that processes every token; null: none"
    )
    normalize_top_k: bool = True
    balance: Literal["loss", "bias", "none"] = Field(
        default="loss",
        description="load balancing: an auxiliary loss over each sequence, an expert bias that follows the "
        "load of a step, without a loss, or none",
    )
    balance_loss_weight: float = Field(
        default=0.01, ge=0, description="weight of the load-balancing loss (balance=loss)"
    )
    bias_update_rate: float = Field(
        default=0.001,
        gt=0,
        description="update of each expert's bias per step (balance=bias)",
    )
    z_loss_weight: float = Field(default=0.001, ge=0, description="weight of the router z-loss")

    @model_validator(mode="after")
    def _check(self) -> "MoEConfig":
        if self.num_experts_per_token > self.num_experts:
            raise ValueError(
                f"num_experts_per_token={self.num_experts_per_token} exceeds "
                f"num_experts={self.num_experts}"
            )
        return self


class TransformerConfig(Section):
    """Sizes common to all transformer stacks."""

    hidden_size: Width
    num_layers: Depth
    num_heads: Depth
    num_kv_heads: Depth
    head_dim: Depth
    intermediate_size: Width

    @model_validator(mode="after")
    def _check_heads(self) -> "TransformerConfig":
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}"
            )
        return self


class RotaryConfig(TransformerConfig):
    """Sizes of a stack with rotary positions, which rotate pairs of dimensions."""

    @model_validator(mode="after")
    def _check_head_dim(self) -> "RotaryConfig":
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even, for rotary positions")
        return self


class ThinkerSizes(RotaryConfig):
    """Decoder LM with the exact architecture of Qwen3 (dense, or MoE if `moe` is set)."""

    max_positions: Positive = 2048
    rope_theta: RopeTheta = 10_000.0
    norm_eps: NormEps = 1e-6
    tie_embeddings: bool = True
    moe: MoEConfig | None = None


class ThinkerConfig(ThinkerSizes):
    """`ThinkerSizes` for one tokenizer."""

    vocab_size: Positive


class MelConfig(Section):
    """Log-mel front end; `num_fft` and `hop` are in samples at `SAMPLE_RATE_HZ`."""

    num_mels: Depth = 80
    num_fft: int = Field(default=512, ge=MEL_HOP, le=2**16)
    hop: Literal[160] = MEL_HOP
    min_hz: float = Field(default=20.0, ge=0)
    max_hz: float = Field(default=7600.0, gt=0, le=SAMPLE_RATE_HZ / 2)

    @model_validator(mode="after")
    def _check(self) -> "MelConfig":
        if self.min_hz >= self.max_hz:
            raise ValueError(f"min_hz={self.min_hz:g} must be below max_hz={self.max_hz:g}")
        if self.num_fft % 2:
            raise ValueError(f"num_fft={self.num_fft} must be even")
        if self.num_mels > self.num_fft // 2:
            raise ValueError(
                f"num_mels={self.num_mels} exceeds the {self.num_fft // 2} frequencies of "
                f"num_fft={self.num_fft}"
            )
        return self


class AudioEncoderSizes(RotaryConfig):
    """Log-mel, 4x convolutional subsampling to 25 Hz, bidirectional encoder, subword CTC head."""

    mel: MelConfig = MelConfig()
    conv_channels: Width = 64
    conv_kernel_size: int = Field(
        default=0,
        ge=0,
        le=1023,
        description="kernel size of the convolution in each layer, in frames, odd; 0: none",
    )
    rope_theta: RopeTheta = 10_000.0
    norm_eps: NormEps = 1e-6
    dropout: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _check_kernel(self) -> "AudioEncoderSizes":
        if self.conv_kernel_size and self.conv_kernel_size % 2 == 0:
            raise ValueError(f"conv_kernel_size={self.conv_kernel_size} must be odd, or 0 for none")
        return self


class AudioEncoderConfig(AudioEncoderSizes):
    """`AudioEncoderSizes` for one tokenizer."""

    vocab_size: Positive


class VisionTowerConfig(TransformerConfig):
    """Pre-norm CLIP ViT (class token and patch tokens, learned positions, LayerNorm, GELU)."""

    image_size: int = Field(default=64, gt=0, le=8192)
    patch_size: Depth = 16
    norm_eps: NormEps = 1e-5

    @model_validator(mode="after")
    def _check_patches(self) -> "VisionTowerConfig":
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is not a multiple of patch_size={self.patch_size}"
            )
        return self

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


class TextTowerSizes(TransformerConfig):
    """CLIP text transformer: causal, learned positions, pooled at the end-of-sequence token."""

    max_positions: int = Field(default=64, ge=2, le=2**20)
    norm_eps: NormEps = 1e-5


class TextTowerConfig(TextTowerSizes):
    """`TextTowerSizes` for one tokenizer."""

    vocab_size: Positive


class ClipSizes(Section):
    """Both towers and the shared embedding of the contrastive stage."""

    vision: VisionTowerConfig
    text: TextTowerSizes
    embedding_size: Width
    initial_temperature: float | None = Field(
        default=None,
        ge=0.01,
        le=100,
        description="initial softmax temperature; default: 0.07, or 0.1 with options.loss=siglip",
    )
    initial_bias: float | None = Field(
        default=None,
        description="initial learned bias of the logits; only with options.loss=siglip (default: -10)",
    )


class ClipConfig(ClipSizes):
    """`ClipSizes` for one tokenizer."""

    text: TextTowerConfig
    initial_temperature: float = Field(default=0.07, ge=0.01, le=100)


class CodecConfig(Section):
    """Mel encoder, residual vector quantizer (EMA codebooks), mel decoder; 40 ms per frame."""

    mel: MelConfig = MelConfig(num_fft=1024, min_hz=0.0, max_hz=8000.0)
    hidden_size: Width = 128
    latent_size: Width = 32
    num_blocks: int = Field(
        default=2, gt=0, le=12, description="residual blocks; block i has dilation 2^i"
    )
    num_codebooks: int = Field(default=2, gt=0, le=64)
    codebook_size: int = Field(default=128, ge=2, le=2**20)
    ema_decay: float = Field(default=0.97, gt=0, lt=1)
    commitment_weight: float = Field(default=0.25, ge=0)
    dead_code_usage: float = Field(
        default=0.1, ge=0, description="codes whose EMA usage falls below this are reinitialized"
    )


class TalkerSizes(RotaryConfig):
    """Code LM: characters as prefix, then K codes per frame; code k is conditioned on codes < k.

    `frames_per_character` is the mean speaking rate: 25 frames and about 17 characters (with spaces) a
    second.
    """

    frames_per_character: float = Field(default=1.5, gt=0, le=1000)
    rope_theta: RopeTheta = 10_000.0
    norm_eps: NormEps = 1e-6
    dropout: float = Field(default=0.0, ge=0, lt=1)
    frame_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of input frames that are masked in training"
    )


class TalkerConfig(TalkerSizes):
    """`TalkerSizes` for one tokenizer, one codec, and in stage `sft` one Thinker."""

    text_vocab_size: Positive
    num_codebooks: Positive
    codebook_size: Positive
    thinker_hidden_size: Positive | None = None


def _overrides(section: type[Section]) -> type[Section]:
    """Derive a section with the same keys and limits, all optional, for overrides of some sizes."""
    fields: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        annotation: Any = field.annotation
        for option in get_args(annotation) or (annotation,):
            if isinstance(option, type) and issubclass(option, Section):
                annotation = _overrides(option)
        if field.metadata:
            annotation = Annotated[(annotation, *field.metadata)]
        fields[name] = (annotation | None, None)
    model = create_model(f"{section.__name__}Overrides", __base__=Section, **fields)
    # Pickle looks up a class by module and name.
    model.__module__ = __name__
    globals()[model.__name__] = model
    return model


class OmniSizes(Section):
    """Sizes that stage `sft` adds to its parts, and overrides of the preset's part sizes."""

    projector_hidden_size: Width = 256
    audio_stack: Depth = Field(
        default=2, description="encoder frames joined into one Thinker position"
    )
    ctc_embeddings: bool = Field(
        default=True,
        description="add embeddings of the tokens that the encoder's CTC head decodes",
    )
    thinker: _overrides(ThinkerSizes) | None = None  # pyright: ignore[reportInvalidTypeForm]
    audio_encoder: _overrides(AudioEncoderSizes) | None = None  # pyright: ignore[reportInvalidTypeForm]
    vision_encoder: _overrides(ClipSizes) | None = None  # pyright: ignore[reportInvalidTypeForm]
    codec: _overrides(CodecConfig) | None = None  # pyright: ignore[reportInvalidTypeForm]
    talker: _overrides(TalkerSizes) | None = None  # pyright: ignore[reportInvalidTypeForm]


class SpecAugmentConfig(Section):
    """SpecAugment masks; both widths are sampled uniformly from zero to the maximum."""

    num_channel_masks: int = Field(default=2, ge=0, le=1000)
    max_channels: Count = 15
    num_time_masks: int = Field(default=2, ge=0, le=1000)
    max_time_share: Fraction = 0.1


class Augmentation(Section):
    """Image augmentation: random scale, shift on a white canvas, and horizontal flip."""

    min_scale: float = Field(default=0.8, ge=0.01, le=10)
    max_scale: float = Field(default=1.1, ge=0.01, le=10)
    flip_probability: Fraction = 0.0

    @model_validator(mode="after")
    def _check(self) -> "Augmentation":
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale={self.min_scale:g} exceeds max_scale={self.max_scale:g}")
        return self


class OmniConfig(Section):
    """Omni model: Thinker, both encoders with projectors, optionally the Talker and its codec."""

    thinker: ThinkerConfig
    audio_encoder: AudioEncoderConfig
    vision_encoder: VisionTowerConfig
    talker: TalkerConfig | None = None
    codec: CodecConfig | None = None
    projector_hidden_size: Width = 256
    audio_stack: Depth = Field(
        default=2, description="encoder frames joined into one Thinker position"
    )
    ctc_embeddings: bool = Field(
        default=True, description="add embeddings of the tokens that the encoder's CTC head decodes"
    )

    @property
    def num_image_tokens(self) -> int:
        return self.vision_encoder.num_patches
