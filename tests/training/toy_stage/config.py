"""Config of the toy stage, and its row of the registry."""

from pathlib import Path

from pydantic import Field

from muomni.config.models import Positive, Section
from muomni.config.registry import StageSpec
from muomni.config.run import RunConfig, SampleBatch


class ToySizes(Section):
    """Sizes of the toy model."""

    hidden_size: Positive = 8


class ToyOptions(Section):
    """Options of the toy stage."""

    max_tokens: Positive = Field(default=64, description="longer texts are truncated")


class ToyRun(RunConfig):
    """Config of the toy stage."""

    batch: SampleBatch
    model: ToySizes = ToySizes()
    options: ToyOptions = ToyOptions()


_HERE = "tests.training.toy_stage"
ROW = StageSpec(
    name="toy",
    summary="predicts the length of a text from its tokens",
    config=ToyRun,
    tasks=("text",),
    upstream=(),
    stage=f"{_HERE}.stage:ToyStage",
    view=f"{_HERE}.view:ToyView",
    evaluate=f"{_HERE}.evaluator:evaluate",
    recipe=Path(__file__).with_name("recipe.yaml"),
)
