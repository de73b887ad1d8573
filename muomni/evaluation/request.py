"""What to evaluate, checked before torch is imported."""

from dataclasses import dataclass
from pathlib import Path

from muomni.config.registry import stage_spec


@dataclass(frozen=True, slots=True)
class EvaluationRequest:
    """A stage of a run and a split; `data` and `upstream` default to those of the run.

    The model is fp32; `tf32` allows TF32 in its matmuls on GPUs, several times as fast. Raises ConfigError for
    an unknown stage.
    """

    stage: str
    run: Path
    data: str | None = None
    upstream: Path | None = None
    split: str = "test"
    max_samples: int | None = None
    tf32: bool = True
    quiet: bool = False  # show no progress

    def __post_init__(self) -> None:
        stage_spec(self.stage)
