"""No statement of a training step makes the host wait for the device.

A device value that becomes a Python number (`item`, `tolist`, `float(...)`) stalls the GPU's queue. Code
that runs in evaluation only (`if not self.training`) may do so.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from muomni.config.registry import STAGES, load, stage_spec
from muomni.data.loading.loader import DeviceCopies
from muomni.models.layers.losses import router_losses
from muomni.observe.step_clock import StepClock
from muomni.training.engine.ema import WeightAverage
from muomni.training.engine.engine import Engine
from muomni.training.engine.weights import MasterWeights
from muomni.training.loop import Loop
from muomni.training.moe import add_router_term, update_biases
from muomni.training.step_reduction import RunningSums, StepReduction
from muomni.training.throughput import Throughput

WAITING_METHODS = {"item", "tolist", "cpu", "numpy", "nonzero"}
WAITING_CALLS = {"float", "int", "bool"}
STEP = [
    Loop.train_step, Loop._prepare, DeviceCopies.__call__, StepReduction.denominators,
    StepReduction._copy_flags, RunningSums.add, Engine.forward, Engine.backward, Engine.end_micro_step,
    MasterWeights.update_average, WeightAverage.update, router_losses, add_router_term,
    update_biases,
    StepClock.mark, Throughput.count_flops, Throughput.count_units,
]  # fmt: skip


def waits(function: Callable[..., Any]) -> list[str]:
    """Calls in a function's source that would wait for a device value."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "not self.training" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in WAITING_METHODS:
                found.append(ast.unparse(node))
            is_constant = all(isinstance(argument, ast.Constant) for argument in node.args)
            if not is_constant and ast.unparse(node.func) in WAITING_CALLS:
                found.append(ast.unparse(node))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


@pytest.mark.parametrize("function", STEP, ids=lambda function: function.__qualname__)
def test_the_step_does_not_wait_for_the_device(function: Callable[..., Any]) -> None:
    assert waits(function) == []


@pytest.mark.parametrize("stage", STAGES)
def test_stages_do_not_wait_for_the_device(stage: str) -> None:
    cls = load(stage_spec(stage).stage)
    for name in ("prepare", "loss_denominators", "begin_step", "after_step"):
        assert waits(getattr(cls, name)) == [], f"{cls.__name__}.{name}"


def test_the_check_finds_waits() -> None:
    def bad(loss: Any) -> float:
        return float(loss) + loss.item()

    assert len(waits(bad)) == 2
