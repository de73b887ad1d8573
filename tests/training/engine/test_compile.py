"""`training.compile` changes the speed of blocks, but no loss, name, or checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from muomni.config.run import RunConfig
from muomni.distributed.discovery import Ranks, discover
from muomni.errors import ConfigError
from muomni.training.planning.dry_run import Device, describe
from muomni.training.session import Request, prepare
from tests.ranks import RankPool
from tests.training.engine.test_expert_parallel import METRICS, engine, moe_config
from tests.training.runs import thinker_config, train

TIMEOUT_S = 300.0  # the first compilation of a rank loads the compiler


def compile_config(data: Path, is_compiled: bool, is_recomputed: bool = False) -> RunConfig:
    training = {
        "compile": is_compiled, "activation_checkpointing": is_recomputed, "max_steps": 6,
        "save_every": 3, "keep_last": 9,
    }  # fmt: skip
    return thinker_config(data, {"training": training})


def train_and_count(**given: Any) -> dict[str, Any]:
    """The result of a run, and the number of graphs that it compiled."""
    torch._dynamo.reset()
    counters.clear()
    result = train(**given)
    return {**result, "num_graphs": counters["stats"]["unique_graphs"]}


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "thinker" / "export" / "model.safetensors")


@pytest.mark.parametrize(
    ("num_ranks", "zero", "is_recomputed"),
    [
        (1, 2, True), (2, 1, False),
        *(
            pytest.param(*layout, marks=pytest.mark.slow)
            for layout in ((1, 0, False), (2, 2, True), (1, 3, False), (2, 3, True))
        ),
    ],
)  # fmt: skip
def test_a_compiled_run_matches_the_eager_one_and_resumes_it(
    num_ranks: int,
    zero: int,
    is_recomputed: bool,
    text_data: Path,
    tmp_path: Path,
    one_rank: RankPool,
    two_ranks: RankPool,
) -> None:
    pool = one_rank if num_ranks == 1 else two_ranks
    engine = {"zero_optimization": {"stage": zero}}

    def run(name: str, is_compiled: bool, resume: str = "auto") -> dict[str, Any]:
        config = compile_config(text_data, is_compiled, is_recomputed)
        given: dict[str, Any] = {"config": config, "run": tmp_path / name, "zero": engine}
        return pool.run(train_and_count, timeout_s=TIMEOUT_S, resume=resume, **given)[0]

    eager, compiled = run("eager", is_compiled=False), run("compiled", is_compiled=True)
    assert eager["num_graphs"] == 0 < compiled["num_graphs"]
    if zero < 3:  # under ZeRO-3, DeepSpeed's hooks break the graph between the layers of a block
        assert compiled["num_graphs"] <= 2
    for metric in ("loss", "grad_norm"):
        expected, got = ([line[metric] for line in r["curve"]] for r in (eager, compiled))
        assert got == pytest.approx(expected, rel=1e-4), metric
    assert compiled["val/loss"] == pytest.approx(eager["val/loss"], rel=1e-5)
    assert list(exported(tmp_path / "compiled")) == list(exported(tmp_path / "eager"))
    checkpoint = tmp_path / "eager" / "thinker" / "checkpoints" / "step_00000003"
    resumed = run("on", is_compiled=True, resume=str(checkpoint))
    assert resumed["losses"] == pytest.approx(eager["losses"][3:], rel=1e-5)


def test_a_dry_run_is_the_same(text_data: Path) -> None:
    eager, compiled = (
        describe(
            prepare(Request(compile_config(text_data, on), Path(), Path(), {}), Ranks(0, 0, 1)),
            Device("cpu", None),
        )
        for on in (False, True)
    )
    assert compiled == eager


@pytest.mark.parametrize(
    "num_expert_ranks", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (0, 1))]
)
def test_experts_stay_eager_inside_compiled_blocks(
    num_expert_ranks: int, text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    eager, compiled = (
        two_ranks.run(
            train_and_count,
            timeout_s=TIMEOUT_S,
            config=moe_config(text_data, {"training": {"compile": on, "max_steps": 4}}),
            run=tmp_path / str(on),
            zero=engine(2, num_expert_ranks),
        )[0]
        for on in (False, True)
    )
    # Before and after the experts.
    assert eager["num_graphs"] == 0 < compiled["num_graphs"] <= 4
    for metric in METRICS:
        expected, got = ([line[metric] for line in r["curve"]] for r in (eager, compiled))
        assert got == pytest.approx(expected, rel=1e-4), metric


def test_a_machine_without_a_compiler_is_rejected_before_the_start(
    text_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"training\.compile needs a C\+\+ compiler \(no-such"):
        prepare(Request(compile_config(text_data, True), tmp_path, tmp_path, {}), discover({}))
    prepare(Request(compile_config(text_data, False), tmp_path, tmp_path, {}), discover({}))
