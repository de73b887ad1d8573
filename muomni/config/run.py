"""The settings of one run: which stage, which data, how it is batched, optimized, saved and logged.

Each number has one owner. What DeepSpeed's JSON may say (ZeRO stage, buckets, communication) is not
repeated here; what stands here (batch sizes, precision, clipping, schedule) is not allowed there.
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from muomni.config.models import Positive, Section

# What a dataset is for.
Task = Literal["text", "image-caption", "speech", "tts", "sft"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

# Of which blocks activations are recomputed: of none (false), of all ("full", true), or of every k-th one.
RecomputePolicy = bool | int | str

Fraction = Annotated[float, Field(ge=0, le=1)]


class MixSection(Section):
    """In which shares corpora are drawn; without it each sample comes once an epoch."""

    weights: dict[str, Annotated[float, Field(ge=0)]] | None = Field(
        default=None, description="share of each corpus by name, relative; 0 leaves it out"
    )
    alpha: float | None = Field(
        default=None, ge=0, description="shares like size^alpha: 1 as they are, 0 all the same"
    )
    unit: Literal["samples", "length"] = Field(
        default="samples", description="what shares and sizes count: samples, or tokens or seconds"
    )

    @model_validator(mode="after")
    def _check(self) -> "MixSection":
        if (self.weights is None) == (self.alpha is None):
            raise ValueError("give exactly one of data.mix.weights and data.mix.alpha")
        if self.weights is not None and not any(self.weights.values()):
            raise ValueError("data.mix.weights needs a weight above 0")
        return self


class StreamSection(Section):
    """Training samples from tars without manifest and index, read from front to back."""

    shards: tuple[str, ...] = Field(
        min_length=1,
        description="paths, URLs or pipe:COMMAND, with braces as in x-{000000..000099}.tar",
    )
    samples_per_shard: Positive = Field(description="how many samples each tar holds")
    samples_per_batch: Positive | None = Field(
        default=None,
        description="of stages that batch by seconds: samples of a micro-batch, whatever their length",
    )
    has_val: bool = Field(
        default=True,
        description="validate on the val split of data.root; false: only the tokenizer is there",
    )


# Options of fsspec back-ends that would put a secret into config.yaml and MLflow.
_SECRET_OPTIONS = {
    "key", "secret", "token", "password", "access_key", "secret_key", "account_key", "sas_token",
    "connection_string", "credential",
}  # fmt: skip


class DataSection(Section):
    """Where samples come from and how many processes decode them."""

    root: str = Field(
        default="data/sample",
        description="one dataset or a folder of datasets: a local path or a URL (s3, gs, hf, http)",
    )
    tokenizer: str | None = Field(default=None, description="default: ROOT/tokenizer.model")
    cache_dir: str | None = Field(
        default=None, description="where remote shards are kept; default: ~/.cache/muomni"
    )
    cache_gb: float = Field(default=100.0, gt=0, description="how much of them is kept, 10^9 bytes")
    storage_options: dict[str, Any] = Field(
        default_factory=dict, description="arguments of the URL's fsspec file system, no secrets"
    )
    num_workers: int = Field(
        default=0, ge=0, description="decoding processes a rank; 0 decodes in the rank"
    )
    prefetch: Positive = Field(default=4, description="batches that each worker keeps ready")
    mix: MixSection | None = Field(default=None, description="shares of several corpora")
    stream: StreamSection | None = Field(
        default=None, description="train on tars without index; order and resuming are approximate"
    )
    block: Positive = Field(
        default=32, description="neighbors in a shard that stay together; fewer in small corpora"
    )
    max_bad_samples: int = Field(
        default=100, ge=0, description="samples that may fail to decode before the run stops"
    )

    @model_validator(mode="after")
    def _check_options(self) -> "DataSection":
        secrets = sorted(_SECRET_OPTIONS & set(self.storage_options))
        if secrets:
            raise ValueError(
                f"storage_options must not hold {', '.join(secrets)}, for the config is written to disk; "
                "use the environment variables of the service or ~/.config/fsspec"
            )
        return self

    @model_validator(mode="after")
    def _check_stream(self) -> "DataSection":
        if self.mix is not None and self.stream is not None:
            raise ValueError(
                "data.mix needs sharded datasets with an index; leave it out with data.stream"
            )
        return self


class BatchSection(Section):
    """How samples become micro-batches; subclasses add what the size of a micro-batch is."""

    micro_batches_per_step: Positive | None = Field(
        default=None, description="over all ranks and accumulation steps; default: one a rank"
    )
    shuffle_window: Positive = Field(
        default=2048, description="samples that are shuffled, bucketed, or packed together"
    )


class PackedBatch(BatchSection):
    """Micro-batches of sequences into which several samples are packed."""

    seq_len: Positive = Field(description="positions per sequence")
    batch_size: Positive = Field(default=1, description="sequences per micro-batch")


class SampleBatch(BatchSection):
    """Micro-batches of a fixed number of samples."""

    batch_size: Positive = Field(description="samples per micro-batch")


class DurationBatch(BatchSection):
    """Micro-batches of samples of similar duration."""

    max_seconds: Positive = Field(description="seconds of audio per micro-batch, with padding")


class OptimSection(Section):
    """The optimizer, gradient clipping and the schedule."""

    name: Literal["adamw", "muon"] = Field(
        default="adamw", description="muon: of linear layers in blocks; all else stays with adamw"
    )
    lr: float = Field(gt=0)
    muon_lr: float | None = Field(
        default=None, gt=0, description="of what muon updates, in adamw's units; default: lr"
    )
    muon_momentum: Fraction = 0.95
    lr_scales: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict,
        description="by pattern of parameter names, e.g. {'talker.*': 0.25}: share of lr; the first one counts",
    )
    betas: tuple[Fraction, Fraction] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    max_grad_norm: float = Field(default=1.0, ge=0, description="0 turns clipping off")
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup_fraction: Fraction = Field(default=0.05, description="of all steps")
    decay_fraction: Fraction = Field(
        default=0.2, description="of all steps, the last ones; schedule wsd only"
    )
    decay_shape: Literal["1-sqrt", "linear"] = Field(
        default="1-sqrt", description="of the decay of schedule wsd"
    )
    final_lr_fraction: Fraction = Field(default=0.1, description="of lr, at the last step")

    @model_validator(mode="after")
    def _check_muon(self) -> "OptimSection":
        if self.muon_lr is not None and self.name != "muon":
            raise ValueError("optim.muon_lr needs optim.name=muon")
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> "OptimSection":
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                "optim.warmup_fraction and optim.decay_fraction are more than all steps together"
            )
        return self


class TrainingSection(Section):
    """Length of the run and how often it validates, saves and logs."""

    max_steps: Positive | None = None
    max_epochs: Positive | None = None
    validate_every: Positive = 200
    validate_batches: Positive | None = Field(
        default=None, description="micro-batches a validation looks at; default: the whole split"
    )
    save_every: Positive = 200
    keep_last: Positive = 2
    log_every: Positive = 10
    recorders: tuple[Literal["mlflow", "tensorboard"], ...] = Field(
        default=("mlflow",),
        description="where metrics go besides metrics.jsonl; tensorboard needs the extra tensorboard",
    )
    activation_checkpointing: RecomputePolicy | dict[str, RecomputePolicy] = Field(
        default=False, description="none, full, k (every k-th block), or one of these by part"
    )
    compile: bool = Field(
        default=False, description="blocks by torch.compile; needs a C++ compiler"
    )
    attention: Literal["mask", "varlen"] = Field(
        default="mask",
        description="of packed and padded rows; varlen: flash kernels by document, on CUDA in bf16 or fp16",
    )
    peak_tflops: float | None = Field(
        default=None, gt=0, description="dense TFLOP/s of a device, for MFU; default: known GPUs'"
    )
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="validate and export the weights' moving average"
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
                    f"{policy!r} is no policy; give none, full, k for every k-th block, or one of these "
                    f"by part, as in {{thinker: full, vision*: none}}"
                )
        return value

    @model_validator(mode="after")
    def _check_length(self) -> "TrainingSection":
        if (self.max_steps is None) == (self.max_epochs is None):
            raise ValueError("give exactly one of training.max_steps and training.max_epochs")
        return self


class ProfileSection(Section):
    """Which steps are recorded by torch.profiler; the file `profile_now` asks for the next ones."""

    start_step: Positive | None = Field(
        default=None, description="first step to record; null: only when the file asks for it"
    )
    num_steps: Positive = 3
    ranks: tuple[Annotated[int, Field(ge=0)], ...] = Field(
        default=(0,), description="which ranks write a trace"
    )


class Fp16Section(Section):
    """DeepSpeed's dynamic loss scaling."""

    initial_scale_power: int = Field(default=16, ge=0)
    scale_window: Positive = 500
    min_scale: float = Field(default=1.0, gt=0)
    hysteresis: Positive = 1
    warn_scale: float | None = Field(
        default=32.0, gt=0, description="warn when the loss scale falls below it; null: never"
    )
    warn_skipped: Fraction = Field(
        default=0.1, description="warn when more than this share of the last 100 steps was skipped"
    )


class NoOptions(Section):
    """For stages without settings of their own."""


class RunConfig(Section):
    """All settings of a run, written to `RUN/STAGE/config.yaml` as resolved.

    Each stage has a subclass (`muomni/config/stages.py`) that types `batch`, `model`, and `options`.
    """

    stage: str
    preset: str
    seed: int = Field(default=0, ge=0)
    precision: Precision = "auto"
    tf32: bool = Field(
        default=False, description="with fp32 on a GPU: faster products of factors of 10 bits"
    )
    data: DataSection = DataSection()
    batch: BatchSection
    optim: OptimSection
    training: TrainingSection
    profile: ProfileSection = ProfileSection()
    fp16: Fp16Section = Fp16Section()
    model: Section = Field(description="sizes of the stage's model")
    options: Section = Field(default=NoOptions(), description="the stage's own settings")

    @model_validator(mode="after")
    def _check_tf32(self) -> "RunConfig":
        if self.tf32 and self.precision in ("bf16", "fp16"):
            raise ValueError(f"tf32 is for precision fp32, not {self.precision}; leave it out")
        return self
