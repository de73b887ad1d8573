"""Offload to host memory changes no metric, checkpoint, or export.

On ranks of a CPU nothing moves, but the code of the engine is another one: its gradients, update and
masters under offload are what these tests run. The last one needs a GPU, and sees what moves.
"""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from muomni.config.names import ENGINES
from muomni.config.run import RunConfig
from muomni.distributed.discovery import Ranks, discover, export_environment
from muomni.errors import ConfigError
from muomni.training.engine.ds_config import read_engine_json
from muomni.training.session import Request, open_loop, prepare
from tests.ranks import RankPool
from tests.training.engine.test_expert_parallel import moe_config
from tests.training.runs import thinker_config, train

# Name: ZeRO stage, and what is offloaded.
LAYOUTS = {
    "zero1": (1, ("offload_optimizer",)),
    "zero2": (2, ("offload_optimizer",)),
    "zero3": (3, ("offload_optimizer",)),
    "zero3_weights": (3, ("offload_param",)),
    "zero3_all": (3, ("offload_optimizer", "offload_param")),
}


def engine(layout: str, is_offloaded: bool = True) -> dict[str, Any]:
    """An engine JSON whose buckets fill up during the backward pass."""
    stage, places = LAYOUTS[layout]
    section: dict[str, Any] = {
        "stage": stage, "overlap_comm": True, "reduce_bucket_size": 5000,
        "stage3_param_persistence_threshold": 100,
    }  # fmt: skip
    if is_offloaded:
        section |= {place: {"device": "cpu", "pin_memory": False} for place in places}
    return {"zero_optimization": section}


def offload_config(data: Path, precision: str = "fp32") -> RunConfig:
    """Eight steps of four micro-batches, most of them clipped, with an average and a checkpoint midway."""
    return thinker_config(
        data,
        {
            "precision": precision,
            "optim": {"max_grad_norm": 0.5},
            "fp16": {"initial_scale_power": 8},
            "training": {"max_steps": 8, "save_every": 4, "keep_last": 9, "ema_decay": 0.5},
        },
    )


@pytest.fixture(scope="module")
def plain(
    text_data: Path, tmp_path_factory: pytest.TempPathFactory, one_rank: RankPool
) -> dict[str, dict[str, Any]]:
    """Runs without ZeRO on one rank, by precision."""
    runs = {}
    for precision in ("fp32", "bf16", "fp16"):
        run = tmp_path_factory.mktemp(precision)
        config = offload_config(text_data, precision)
        result = one_rank.run(train, config=config, run=run, zero={"zero_optimization": {}})[0]
        runs[precision] = {**result, "run": run}
    return runs


def exported(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "thinker" / "export" / "model.safetensors")


def metrics(result: dict[str, Any], name: str) -> list[float]:
    return [line[name] for line in result["curve"]]


CASES = [
    *((num_ranks, layout, "fp32") for num_ranks in (1, 2) for layout in LAYOUTS),
    (2, "zero2", "bf16"), (2, "zero3_all", "bf16"), (1, "zero2", "fp16"), (2, "zero3_all", "fp16"),
]  # fmt: skip
TOLERANCES = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 2e-2}


@pytest.mark.parametrize(("num_ranks", "layout", "precision"), CASES)
def test_losses_exports_and_resumes_are_those_without_offload(
    num_ranks: int,
    layout: str,
    precision: str,
    text_data: Path,
    tmp_path: Path,
    plain: dict[str, dict[str, Any]],
    one_rank: RankPool,
    two_ranks: RankPool,
) -> None:
    pool, expected = one_rank if num_ranks == 1 else two_ranks, plain[precision]
    common: dict[str, Any] = {
        "config": offload_config(text_data, precision),
        "zero": engine(layout),
    }
    straight = pool.run(train, run=tmp_path / "straight", **common)[0]
    tolerance = TOLERANCES[precision]
    assert straight["losses"] == pytest.approx(expected["losses"], rel=tolerance)
    norms = pytest.approx(metrics(expected, "grad_norm"), rel=10 * tolerance)
    assert metrics(straight, "grad_norm") == norms
    # The export is the average of the fp32 weights, and so are the weights of the validation.
    assert straight["val/loss"] == pytest.approx(expected["val/loss"], rel=tolerance)
    weights, wanted = exported(tmp_path / "straight"), exported(expected["run"])
    assert weights.keys() == wanted.keys()
    if precision == "fp32":
        for name, weight in wanted.items():
            torch.testing.assert_close(weights[name], weight, rtol=0, atol=2e-5)
    else:  # of the master weights, not of the 16-bit ones
        short = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
        assert any(not torch.equal(weight, weight.to(short).float()) for weight in weights.values())
    earlier = tmp_path / "straight" / "thinker" / "checkpoints" / "step_00000004"
    resumed = pool.run(train, run=tmp_path / "on", resume=str(earlier), **common)[0]
    assert resumed["losses"] == straight["losses"][4:]
    again = exported(tmp_path / "on")
    assert all(torch.equal(again[name], weight) for name, weight in weights.items())


@pytest.mark.parametrize("layout", ["zero2", "zero3_all"])
def test_a_checkpoint_resumes_with_and_without_offload(
    layout: str, text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = offload_config(text_data)
    straight = two_ranks.run(train, config=config, run=tmp_path / "a", zero=engine(layout))[0]
    earlier = tmp_path / "a" / "thinker" / "checkpoints" / "step_00000004"
    without = engine(layout, is_offloaded=False)
    resumed = two_ranks.run(
        train, config=config, run=tmp_path / "b", zero=without, resume=str(earlier)
    )[0]
    assert resumed["losses"] == pytest.approx(straight["losses"][4:], rel=1e-5)
    back = two_ranks.run(
        train,
        config=config,
        run=tmp_path / "c",
        zero=engine(layout),
        resume=str(tmp_path / "b" / "thinker" / "checkpoints" / "step_00000008"),
    )[0]
    assert back["val/loss"] == pytest.approx(straight["val/loss"], rel=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_sharded_experts_are_offloaded(
    layout: str, text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = moe_config(text_data, {"training": {"max_steps": 5}})
    divided = {"expert_parallel": {"enabled": True, "autoep_size": 2}}
    results = [
        two_ranks.run(train, config=config, run=tmp_path / name, zero=zero)[0]
        for name, zero in (
            ("plain", {"zero_optimization": {"stage": 0}}),
            ("offloaded", {**engine(layout), **divided}),
        )
    ]
    for metric in ("loss", "grad_norm"):
        expected, got = (metrics(result, metric) for result in results)
        assert got == pytest.approx(expected, rel=1e-4), metric


@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
def test_shipped_configs_offload(
    name: str, text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    config = thinker_config(text_data, {"training": {"max_steps": 2}})
    plain, offloaded = (
        one_rank.run(train, config=config, run=tmp_path / kind, zero=kind)[0]["losses"]
        for kind in (name.partition("_")[0], name)
    )
    assert offloaded == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"offload_optimizer": {"device": "cpu"}}, "needs ZeRO 1 or 2 or 3.* stage 0"),
        ({"stage": 2, "offload_param": {"device": "cpu"}}, "offload_param needs ZeRO 3.* stage 2"),
        ({"stage": 3, "offload_optimizer": {"device": "nvme"}}, "offloads to nvme, which is not"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, "offload_param offloads to nvme"),
        ({"stage": 2, "cpu_offload": True}, "is deprecated in DeepSpeed"),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}},
            r"offload_optimizer\.ratio is not supported",
        ),
        (
            {"stage": 3, "offload_optimizer": {"device": "cpu", "super_offload": True}},
            r"super_offload is not supported",
        ),
    ],
)
def test_unsupported_offload_is_rejected_before_the_start(
    section: dict[str, Any], message: str, text_data: Path, tmp_path: Path
) -> None:
    request = Request(thinker_config(text_data), tmp_path, tmp_path, {"zero_optimization": section})
    with pytest.raises(ConfigError, match=message):
        prepare(request, discover({}))


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ({"zero_force_ds_cpu_optimizer": True}, "torch's fused AdamW, which is as fast"),
        ({"data_types": {"grad_accum_dtype": "fp32"}}, "data_types .* does not work with offload"),
    ],
)
def test_keys_that_conflict_with_offload_are_rejected(
    added: dict[str, Any], message: str, text_data: Path, tmp_path: Path
) -> None:
    engine_json = {**engine("zero2"), **added}
    with pytest.raises(ConfigError, match=message):
        prepare(Request(thinker_config(text_data), tmp_path, tmp_path, engine_json), discover({}))


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_muon_is_not_offloaded(layout: str | None, text_data: Path, tmp_path: Path) -> None:
    config = thinker_config(text_data, {"optim": {"name": "muon"}})
    section = {"offload_optimizer": {"device": "cpu"}}
    engine_json = {"zero_optimization": section} if layout is None else engine(layout)
    with pytest.raises(ConfigError, match=r"muon runs without ZeRO|offload_optimizer needs ZeRO"):
        prepare(Request(config, tmp_path, tmp_path, engine_json), discover({}))


def test_device_none_disables_offload(text_data: Path, tmp_path: Path) -> None:
    section = {"stage": 0, "offload_optimizer": {"device": "none"}}
    prepare(
        Request(thinker_config(text_data), tmp_path, tmp_path, {"zero_optimization": section}),
        discover({}),
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["zero2_offload", "zero3_offload"])
def test_offloaded_state_of_a_gpu_is_on_the_host(
    name: str, text_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from muomni.training.engine.process_group import process_group

    environment = dict(os.environ)
    export_environment(Ranks(0, 0, 1), environment)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    config = thinker_config(text_data, {"precision": "bf16", "training": {"ema_decay": 0.9}})
    engine_json = read_engine_json(ENGINES / f"{name}.json")
    session = prepare(Request(config, tmp_path, tmp_path, engine_json, "never"), discover({}))
    with process_group(session.device):
        loop = open_loop(session)
        loop.train_step()
        optimizer, average = loop.engine.optimizer, loop.engine.masters.average
        assert average is not None
        state = [*loop.engine.masters.tensors(), *average.tensors]
        state += [
            value
            for values in optimizer.optimizer.state.values()
            for value in values.values()
            if isinstance(value, torch.Tensor)
        ]
        assert {tensor.device.type for tensor in state} == {"cpu"}
        if name == "zero3_offload":
            parameters: list[Any] = list(loop.engine.task.parameters())
            large = [p for p in parameters if not p.ds_persist]
            assert large and {p.ds_tensor.device.type for p in large} == {"cpu"}
        masters = [weight.clone() for weight in loop.engine.masters.tensors()]
        with loop.engine.masters.averaged():
            state_dict = loop.engine.full_state("thinker.")
        assert all(weight.device.type == "cpu" for weight in state_dict.values())
        after = loop.engine.masters.tensors()
        assert all(torch.equal(a, b) for a, b in zip(masters, after, strict=True))
        loop.engine.deepspeed.destroy()
