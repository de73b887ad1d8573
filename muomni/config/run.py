"""The settings of a run: stage, data, batches, optimizer, training, and logging.

Each setting has one owner: ZeRO, buckets, and communication belong to DeepSpeed's JSON and are absent here;
batch sizes, precision, clipping, and schedule belong here and are rejected there.
"""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, field_validator, model_validator

from muomni.config.models import Section
from muomni.config.values import Count, Fraction, FromList, PathText, Positive

# The task of a dataset.
Task = Literal["text", "image-caption", "speech", "tts", "sft"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

# Blocks whose activations are recomputed: none (false), all ("full", true), or every k-th.
RecomputePolicy = bool | int | str

# Moving averages never forget with a decay of 1.
Decay = Annotated[float, Field(ge=0, lt=1)]


class MixSection(Section):
    """Sampling weights of corpora; without them, an epoch has each sample once."""

    weights: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        default=None, description="relative weight of each corpus by name; 0 skips it"
    )
    alpha: float | None = Field(
        default=None,
        ge=0,
        le=10,
        description="weights proportional to size^alpha; 1: natural, 0: uniform",
    )
    unit: Literal["samples", "length"] = Field(
        default="samples",
        description="unit of weights and sizes: samples, or length in tokens or seconds",
    )

    @model_validator(mode="after")
    def _check(self) -> "MixSection":
        if (self.weights is None) == (self.alpha is None):
            raise ValueError("set exactly one of data.mix.weights and data.mix.alpha")
        if self.weights is not None and not any(self.weights.values()):
            raise ValueError("data.mix.weights needs a weight above 0")
        return self


class StreamSection(Section):
    """Training samples streamed sequentially from tars without manifest and index."""

    shards: Annotated[tuple[PathText, ...], FromList] = Field(
        min_length=1,
        description="paths, URLs, or pipe:COMMAND, with braces as in x-{000000..000099}.tar",
    )
    samples_per_shard: Positive = Field(description="samples in each tar")
    samples_per_step: Positive | None = Field(
        default=None,
        description="samples per optimizer step, of any length, in stages that batch by seconds",
    )
    samples_per_micro_batch: Positive | None = Field(
        default=None,
        description="most samples per micro-batch, in stages that batch by seconds",
    )
    has_val: bool = Field(
        default=True,
        description="validate on the val split of data.root; false: it has only the tokenizer",
    )


# fsspec options that would leak a secret into config.yaml and MLflow.
_SECRET_OPTIONS = {
    "key", "secret", "token", "password", "access_key", "secret_key", "account_key", "sas_token",
    "connection_string", "credential",
}  # fmt: skip


def _check_workers(value: object) -> object:
    if value != "auto" and (type(value) is not int or not 0 <= value <= 1024):
        raise ValueError("write a number of processes, at most 1024, or auto")
    return value


def _check_text_keys(value: Any) -> None:
    """Raise ValueError for a key that is no text at any depth, since JSON could not record it."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if not isinstance(key, str):
                raise ValueError(f"key {key!r} must be a text; quote it")
            _check_text_keys(inner)
    elif isinstance(value, list):
        for inner in value:
            _check_text_keys(inner)


class DataSection(Section):
    """Source of the samples, and the processes that decode them."""

    root: PathText = Field(
        default="data/sample",
        validate_default=True,
        description="one dataset or a folder of datasets: a local path or a URL (s3, gs, hf, http)",
    )
    tokenizer: PathText | None = Field(default=None, description="default: ROOT/tokenizer.model")
    cache_dir: PathText | None = Field(
        default=None, description="folder that caches remote shards; default: ~/.cache/muomni"
    )
    cache_gb: float = Field(
        default=100.0, gt=0, le=1e9, description="maximum size of the cache, in 10^9 bytes"
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of the fsspec file system of the URL, without secrets",
    )
    num_workers: Annotated[int | Literal["auto"], PlainValidator(_check_workers)] = Field(
        default="auto",
        description="worker processes per rank; 0: decode in the rank itself; auto: cores of the rank - 1 on "
        "GPUs, 0 on CPUs",
    )
    prefetch: Positive = Field(default=4, description="batches that each worker prefetches")
    mix: MixSection | None = Field(default=None, description="mix of several corpora")
    stream: StreamSection | None = Field(
        default=None, description="stream tars without index; order and resuming are approximate"
    )
    block: Positive = Field(
        default=32,
        description="adjacent samples of a shard that are shuffled as one block; fewer in small corpora",
    )
    max_bad_fraction: Fraction = Field(
        default=0.01,
        description="fraction of the last 10,000 samples that may be unusable before the run stops; one bad "
        "sample is always tolerated, unless 0",
    )

    @field_validator("storage_options")
    @classmethod
    def _check_keys(cls, value: dict[str, Any]) -> dict[str, Any]:
        _check_text_keys(value)
        return value

    @model_validator(mode="after")
    def _check_options(self) -> "DataSection":
        secrets = sorted(_SECRET_OPTIONS & set(self.storage_options))
        if secrets:
            raise ValueError(
                f"storage_options must not contain {', '.join(secrets)}, since the config is written to disk; "
                "use the environment variables of the service, or ~/.config/fsspec"
            )
        return self

    @model_validator(mode="after")
    def _check_stream(self) -> "DataSection":
        if self.mix is not None and self.stream is not None:
            raise ValueError(
                "data.mix needs sharded datasets with an index; remove it, or remove data.stream"
            )
        return self


class BatchSection(Section):
    """The global batch of an optimizer step, and the micro-batch that fits a device.

    Subclasses add both in the unit of the stage. The global batch is spread over ranks and micro-batches, so
    the micro-batch affects speed and memory, not the result.
    """

    global_key: ClassVar[str]  # the key of the global batch

    shuffle_window: Positive = Field(
        default=2048, description="samples that are shuffled, bucketed, or packed together"
    )

    @property
    def max_ranks(self) -> int | None:
        """The largest number of ranks that a global batch can be spread over; None if it varies."""
        return None

    @abstractmethod
    def describe(self) -> str:
        """The global batch in words, and how much it was rounded."""


class PackedBatch(BatchSection):
    """Global batches of sequences, each packed with several samples."""

    global_key = "global_tokens"

    seq_len: Positive = Field(description="positions per sequence")
    global_tokens: Positive = Field(
        description="positions per optimizer step over all ranks; rounded to full sequences"
    )
    micro_sequences: Positive = Field(
        default=1, description="most sequences per micro-batch of a rank"
    )

    @property
    def global_sequences(self) -> int:
        """Sequences per optimizer step."""
        return max(1, round(self.global_tokens / self.seq_len))

    @property
    def max_ranks(self) -> int:
        return self.global_sequences

    def describe(self) -> str:
        tokens = self.global_sequences * self.seq_len
        text = f"{tokens:,} tokens in {self.global_sequences:,} sequences"
        if tokens == self.global_tokens:
            return text
        return (
            f"{text} (rounded from {self.global_tokens:,}, {tokens / self.global_tokens - 1:+.1%})"
        )


class SampleBatch(BatchSection):
    """Global batches of a fixed number of samples."""

    global_key = "global_samples"

    global_samples: Positive = Field(description="samples per optimizer step over all ranks")
    micro_samples: Positive = Field(description="most samples per micro-batch of a rank")

    @property
    def max_ranks(self) -> int:
        return self.global_samples

    def describe(self) -> str:
        return f"{self.global_samples:,} samples"


class DurationBatch(BatchSection):
    """Global batches of samples of similar duration."""

    global_key = "global_seconds"

    global_seconds: Positive = Field(
        description="seconds of audio per optimizer step over all ranks, on average"
    )
    micro_seconds: Positive = Field(
        description="most seconds of audio per micro-batch of a rank, including padding"
    )

    def describe(self) -> str:
        return f"about {self.global_seconds:,} s of audio"


class OptimSection(Section):
    """Optimizer, gradient clipping, and learning-rate schedule."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw",
        description="muon: for linear layers and convolutions in stacks; everything else uses adamw",
    )
    lr: float = Field(gt=0, description="peak learning rate")
    muon_lr: float | None = Field(
        default=None,
        gt=0,
        description="learning rate of muon's parameters, scaled like adamw's; default: lr",
    )
    muon_momentum: Decay = 0.95
    lr_scales: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="factors on lr by parameter name pattern, e.g. {'talker.*': 0.25}; first match wins",
    )
    betas: Annotated[tuple[Decay, Decay], FromList] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0, le=1)
    weight_decay: float = Field(default=0.1, ge=0, description="applied to matrices only")
    max_grad_norm: float = Field(
        default=1.0, ge=0, description="gradient clipping norm; 0: no clipping"
    )
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_fraction: Fraction = Field(default=0.05, description="fraction of all steps")
    decay_fraction: Fraction = Field(
        default=0.2, description="fraction of all steps, at the end; schedule wsd only"
    )
    decay_shape: Literal["1-sqrt", "linear"] = Field(
        default="1-sqrt", description="shape of the decay; schedule wsd only"
    )
    final_lr_fraction: Fraction = Field(
        default=0.1, description="lr at the last step, as a fraction of the peak"
    )

    @model_validator(mode="after")
    def _check_muon(self) -> "OptimSection":
        if self.muon_lr is not None and self.name != "muon":
            raise ValueError("optim.muon_lr needs optim.name=muon")
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> "OptimSection":
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                "the sum of optim.warmup_fraction and optim.decay_fraction must not exceed 1"
            )
        return self


class TrainingSection(Section):
    """Length of the run, and how often it validates, saves, and logs."""

    max_steps: Positive | None = None
    max_epochs: int | None = Field(default=None, gt=0, le=100_000)
    validate_every: Positive = Field(default=200, description="steps between validations")
    validate_samples: Positive | None = Field(
        default=None,
        description="samples per validation, drawn by the seed from the entire split, the same each time; "
        "default: all",
    )
    sample_outputs: bool | Literal["auto"] = Field(
        default="auto",
        description="write sample outputs at validations; auto: within a tenth of their time, and not if "
        "ranks share the weights (ZeRO 3, experts); they are always written after training",
    )
    save_every: Positive = Field(default=200, description="steps between checkpoints")
    keep_last: Positive = Field(
        default=2, description="checkpoints to keep; the best one is kept in addition"
    )
    log_every: Positive = Field(default=10, description="steps between logged metrics")
    collective_timeout_s: Positive = Field(
        default=1800, description="a run ends when ranks wait longer than this for each other"
    )
    recorders: Annotated[tuple[Literal["mlflow", "tensorboard"], ...], FromList] = Field(
        default=("mlflow",),
        description="backends for metrics besides metrics.jsonl; tensorboard needs the extra tensorboard",
    )
    experiment: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        default=None, description="MLflow experiment; default: the name of the run folder"
    )
    register_model: Annotated[str, Field(min_length=1, max_length=200)] | None = Field(
        default=None, description="name under which MLflow registers the export; default: none"
    )
    activation_checkpointing: RecomputePolicy | dict[str, RecomputePolicy] = Field(
        default=False,
        description="none, full, k (every k-th block), or a mapping from part to one of these",
    )
    compile: bool | Literal["auto"] = Field(
        default="auto",
        description="torch.compile each block; auto: on GPUs whose machine has a C++ compiler and "
        "triton, except under ZeRO 3",
    )
    attention: Literal["auto", "mask", "varlen"] = Field(
        default="auto",
        description="attention in packed and padded sequences; varlen: flash kernels per document; "
        "auto: varlen on CUDA in bf16 or fp16, else mask",
    )
    peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="dense peak TFLOP/s of a device, for MFU; default: from a table of GPUs",
    )
    ema_decay: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="decay of an EMA of the weights, which is validated and exported; default: no EMA",
    )

    @field_validator("activation_checkpointing")
    @classmethod
    def _check_policy(
        cls, value: RecomputePolicy | dict[str, RecomputePolicy]
    ) -> RecomputePolicy | dict[str, RecomputePolicy]:
        for policy in value.values() if isinstance(value, dict) else [value]:
            is_known = policy in ("none", "full") if isinstance(policy, str) else policy >= 0
            if not is_known:
                raise ValueError(
                    f"{policy!r} is not a policy; use none, full, k for every k-th block, or a mapping such as "
                    f"{{thinker: full, vision*: none}}"
                )
        return value

    @model_validator(mode="after")
    def _check_length(self) -> "TrainingSection":
        if (self.max_steps is None) == (self.max_epochs is None):
            raise ValueError("set exactly one of training.max_steps and training.max_epochs")
        return self


class ProfileSection(Section):
    """Steps to record with torch.profiler; creating the file `profile_now` records the next ones."""

    start_step: Positive | None = Field(
        default=None, description="first step to record; null: only on request by the file"
    )
    num_steps: Positive = 3
    ranks: Annotated[tuple[Count, ...], FromList] = Field(
        default=(0,), description="ranks that write a trace"
    )


class Fp16Section(Section):
    """DeepSpeed's dynamic loss scaling."""

    initial_scale_power: int = Field(default=16, ge=0, le=64)
    scale_window: Positive = 500
    min_scale: float = Field(default=1.0, gt=0)
    hysteresis: Positive = 1
    warn_scale: float | None = Field(
        default=32.0, gt=0, description="warn if the loss scale falls below this; null: never"
    )
    warn_skipped: Fraction = Field(
        default=0.1, description="warn if more than this fraction of the last 100 steps was skipped"
    )

    @model_validator(mode="after")
    def _check_scales(self) -> "Fp16Section":
        if self.min_scale > 2.0**self.initial_scale_power:
            raise ValueError(
                f"fp16.min_scale={self.min_scale:g} exceeds the initial scale, "
                f"2^{self.initial_scale_power}"
            )
        return self


class NoOptions(Section):
    """Options of stages without any."""


class RunConfig(Section):
    """All settings of a run; the resolved config is written to `RUN/STAGE/config.yaml`.

    Each stage has a subclass in `muomni/config/stages.py` that types `batch`, `model`, and `options`.
    """

    stage: str
    preset: str
    seed: int = Field(default=0, ge=0, lt=2**32)
    precision: Precision = "auto"
    tf32: bool = Field(
        default=False, description="use TF32 (10-bit mantissa) for fp32 matmuls on GPUs"
    )
    data: DataSection = Field(default_factory=DataSection)
    batch: BatchSection
    optim: OptimSection
    training: TrainingSection
    profile: ProfileSection = ProfileSection()
    fp16: Fp16Section = Fp16Section()
    model: Section = Field(description="model sizes")
    options: Section = Field(default=NoOptions(), description="options of the stage")

    @model_validator(mode="after")
    def _check_tf32(self) -> "RunConfig":
        if self.tf32 and self.precision in ("bf16", "fp16"):
            raise ValueError(f"tf32 needs precision fp32, not {self.precision}; remove tf32")
        return self
