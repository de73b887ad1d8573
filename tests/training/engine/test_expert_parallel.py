"""Expert parallelism (AutoEP) changes neither losses nor exports."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from muomni.checkpoint.export import read_export
from muomni.config.loading import run_config
from muomni.config.models import MoEConfig, ThinkerConfig
from muomni.config.run import RunConfig
from muomni.distributed.discovery import Ranks
from muomni.errors import CheckpointError, ConfigError
from muomni.models.language.convert_qwen3 import qwen3_config, to_qwen3
from muomni.models.language.thinker import Thinker
from muomni.models.layers.moe import CHOICE_BIAS
from muomni.training.engine.expert_parallel import complete_section
from muomni.training.session import Request, prepare
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train

pytestmark = pytest.mark.xdist_group("many_ranks")

SIZES = {"num_experts": 4, "num_experts_per_token": 2, "expert_intermediate_size": 32}
MOE = MoEConfig.model_validate(SIZES)
# With a shared expert, and a bias instead of a loss to balance the load.
BIASED = {**SIZES, "shared_intermediate_size": 16, "balance": "bias", "bias_update_rate": 0.01}
METRICS = ("loss", "grad_norm", "moe/balance_loss", "moe/z_loss", "moe/layer1/entropy")


def moe_config(
    data: Path, changes: dict[str, Any] | None = None, moe: dict[str, Any] = SIZES
) -> RunConfig:
    """Ten steps, most of them with clipped gradients."""
    config = thinker_config(data, {"training": {"max_steps": 10}, "optim": {"max_grad_norm": 0.5}})
    content = config.model_dump()
    content["model"] = {**content["model"], "moe": moe}
    for section, values in (changes or {}).items():
        content[section] = {**content[section], **values} if isinstance(values, dict) else values
    return run_config(content)


def engine(zero: int, num_expert_ranks: int = 0) -> dict[str, Any]:
    """Engine JSON with small buckets; 0 expert ranks = plain blocks."""
    content: dict[str, Any] = {"zero_optimization": {"stage": zero, "reduce_bucket_size": 20_000}}
    if num_expert_ranks:
        content["expert_parallel"] = {"enabled": True, "autoep_size": num_expert_ranks}
    return content


@pytest.fixture(scope="module")
def alone(
    text_data: Path, tmp_path_factory: pytest.TempPathFactory, one_rank: RankPool
) -> dict[str, Any]:
    """The reference: the plain block on one rank, with accumulation."""
    run = tmp_path_factory.mktemp("alone")
    result = one_rank.run(train, config=moe_config(text_data), run=run, zero=engine(0))[0]
    return {**result, "run": run}


def export_state(run: Path) -> dict[str, torch.Tensor]:
    return read_export(run / "thinker" / "export", "thinker").state()


# -- the same training -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("zero", "num_expert_ranks"),
    [(0, 0), (1, 0), (2, 0), (3, 0), (2, 1), (3, 1), (0, 2), (1, 2), (2, 2), (3, 2)],
)
def test_two_ranks_match_one(
    zero: int,
    num_expert_ranks: int,
    text_data: Path,
    tmp_path: Path,
    alone: dict[str, Any],
    two_ranks: RankPool,
) -> None:
    json_ = engine(zero, num_expert_ranks)
    result = two_ranks.run(train, config=moe_config(text_data), run=tmp_path, zero=json_)[0]
    for metric in METRICS:
        expected = [line[metric] for line in alone["curve"]]
        got = [line[metric] for line in result["curve"]]
        assert got == pytest.approx(expected, rel=1e-4), metric
    assert alone["curve"][0]["grad_norm"] > 0.5
    assert result["val/loss"] == pytest.approx(alone["val/loss"], rel=1e-5)
    expected_state = export_state(alone["run"])
    state = export_state(tmp_path)
    assert state.keys() == expected_state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected_state[name], atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("precision", "tolerance", "zero"),
    [("bf16", 0.05, 1), ("bf16", 0.05, 2), ("bf16", 0.05, 3), ("fp16", 0.01, 1), ("fp16", 0.01, 3)],
)
def test_16_bit_runs_follow(
    precision: str,
    tolerance: float,
    zero: int,
    text_data: Path,
    tmp_path: Path,
    alone: dict[str, Any],
    two_ranks: RankPool,
) -> None:
    changes = {"precision": precision, "fp16": {"initial_scale_power": 8}}
    config = moe_config(text_data, changes)
    result = two_ranks.run(train, config=config, run=tmp_path, zero=engine(zero, 2))[0]
    assert result["losses"] == pytest.approx(alone["losses"], abs=tolerance)
    norms = [line["grad_norm"] for line in alone["curve"]]
    assert [line["grad_norm"] for line in result["curve"]] == pytest.approx(norms, rel=0.1)
    assert all(tensor.dtype == torch.float32 for tensor in export_state(tmp_path).values())


@pytest.mark.parametrize(
    ("zero", "num_expert_ranks", "policy"), [(3, 0, 2), (1, 2, True), (3, 2, "full"), (3, 2, 2)]
)
def test_recomputed_activations_change_nothing(
    zero: int,
    num_expert_ranks: int,
    policy: bool | int | str,
    text_data: Path,
    tmp_path: Path,
    alone: dict[str, Any],
    two_ranks: RankPool,
) -> None:
    config = moe_config(text_data, {"training": {"activation_checkpointing": policy}})
    json_ = engine(zero, num_expert_ranks)
    result = two_ranks.run(train, config=config, run=tmp_path, zero=json_)[0]
    for metric in METRICS:
        expected = [line[metric] for line in alone["curve"]]
        got = [line[metric] for line in result["curve"]]
        assert got == pytest.approx(expected, rel=1e-4), metric


@pytest.fixture(scope="module")
def biased(
    text_data: Path, tmp_path_factory: pytest.TempPathFactory, one_rank: RankPool
) -> dict[str, Any]:
    """The plain block on one rank with the changes of `BIASED`."""
    run, config = tmp_path_factory.mktemp("biased"), moe_config(text_data, moe=BIASED)
    result = one_rank.run(train, config=config, run=run, zero=engine(0))[0]
    return {**result, "run": run}


@pytest.mark.parametrize(
    ("zero", "num_expert_ranks", "precision"),
    [(3, 0, "fp32"), (2, 2, "fp32"), (3, 2, "fp32"), (2, 2, "bf16")],
)
def test_two_ranks_match_one_with_biases_and_a_shared_expert(
    zero: int,
    num_expert_ranks: int,
    precision: str,
    text_data: Path,
    tmp_path: Path,
    biased: dict[str, Any],
    two_ranks: RankPool,
) -> None:
    config = moe_config(text_data, {"precision": precision}, BIASED)
    json_ = engine(zero, num_expert_ranks)
    result = two_ranks.run(train, config=config, run=tmp_path, zero=json_)[0]
    state, expected_state = export_state(tmp_path), export_state(biased["run"])
    assert state.keys() == expected_state.keys()
    biases = {name: tensor for name, tensor in state.items() if name.endswith(CHOICE_BIAS)}
    assert len(biases) == 2
    for bias in biases.values():  # never rounded to 16 bits
        steps = bias / BIASED["bias_update_rate"]
        torch.testing.assert_close(steps, steps.round(), atol=1e-4, rtol=0)
        assert bias.abs().max() > 0
    if precision == "bf16":
        assert result["losses"] == pytest.approx(biased["losses"], abs=0.05)
        return
    for metric in METRICS:
        expected = [line[metric] for line in biased["curve"]]
        assert [line[metric] for line in result["curve"]] == pytest.approx(expected, rel=1e-4)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected_state[name], atol=2e-4, rtol=1e-3, msg=name)


def test_router_losses_train_the_routers(
    text_data: Path, tmp_path: Path, alone: dict[str, Any], one_rank: RankPool
) -> None:
    config = moe_config(text_data, moe={**SIZES, "balance_loss_weight": 1.0})
    strong = one_rank.run(train, config=config, run=tmp_path, zero=engine(0))[0]
    last, weak = strong["curve"][-1], alone["curve"][-1]
    assert last["moe/balance_loss"] < weak["moe/balance_loss"] - 0.005
    assert last["moe/layer1/entropy"] > weak["moe/layer1/entropy"]
    assert last["loss"] < strong["curve"][0]["loss"]


@pytest.mark.parametrize(("zero", "num_expert_ranks"), [(2, 1), (2, 2), (2, 4), (3, 4), (0, 2)])
def test_four_ranks_match_one(
    zero: int,
    num_expert_ranks: int,
    text_data: Path,
    tmp_path: Path,
    alone: dict[str, Any],
    four_ranks: RankPool,
) -> None:
    """One expert per rank, two groups of two ranks that share experts, or all experts on each rank."""
    config, json_ = moe_config(text_data), engine(zero, num_expert_ranks)
    result = four_ranks.run(train, config=config, run=tmp_path, zero=json_)[0]
    for metric in METRICS:
        expected = [line[metric] for line in alone["curve"]]
        got = [line[metric] for line in result["curve"]]
        assert got == pytest.approx(expected, rel=1e-4), metric
    state, expected_state = export_state(tmp_path), export_state(alone["run"])
    assert state.keys() == expected_state.keys()
    for name, tensor in state.items():  # each expert once, at its index
        torch.testing.assert_close(tensor, expected_state[name], atol=2e-4, rtol=1e-3, msg=name)


# -- exports ---------------------------------------------------------------------------------------


def test_an_export_holds_every_expert_and_loads_anywhere(
    text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = moe_config(text_data, {"training": {"max_steps": 3}})
    two_ranks.run(train, config=config, run=tmp_path, zero=engine(3, 2))
    export = read_export(tmp_path / "thinker" / "export", "thinker")
    sizes = export.config(ThinkerConfig)
    model = Thinker(sizes).eval()
    export.load_into(model)
    block: Any = model.stack.blocks[0]
    experts = block.mlp.experts.gate_up_proj.detach()
    assert experts.shape[0] == 4
    assert len({expert.sum().item() for expert in experts}) == 4
    reference = Qwen3MoeForCausalLM(Qwen3MoeConfig(**qwen3_config(sizes))).eval()
    reference.load_state_dict(to_qwen3(export.state(), sizes))
    ids = torch.randint(0, sizes.vocab_size, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(
            model.logits(model(ids)), reference(ids).logits, atol=1e-4, rtol=1e-4
        )


# -- resume ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_resume_with_experts_repeats_the_losses(
    zero: int, text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    moe = BIASED if zero == 2 else SIZES
    config = moe_config(text_data, {"training": {"save_every": 4}}, moe)
    json_ = engine(zero, 2)
    straight = two_ranks.run(train, config=config, run=tmp_path, zero=json_)[0]
    export = export_state(tmp_path)
    for newer in sorted((tmp_path / "thinker" / "checkpoints").glob("step_*"))[1:]:
        shutil.rmtree(newer)
    shutil.rmtree(tmp_path / "thinker" / "export")
    if zero == 1:
        with pytest.raises(CheckpointError, match=r"experts over 2 ranks,.*this run has.*over 1 "):
            two_ranks.run(train, config=config, run=tmp_path, zero=engine(zero, 1))
    resumed = two_ranks.run(train, config=config, run=tmp_path, zero=json_)[0]
    assert [line["step"] for line in resumed["curve"]] == list(range(1, 11))
    assert resumed["losses"] == straight["losses"]
    torch.testing.assert_close(export_state(tmp_path), export, atol=0, rtol=0)


# -- the section -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "moe", "world_size", "message"),
    [
        ({"autoep_size": 2}, None, 2, "the model has no experts; take a preset with model.moe"),
        ({"autoep_size": 3}, MOE, 3, "autoep_size=3 does not divide the 4 experts.*fit here: 1$"),
        ({"autoep_size": 4}, MOE, 2, "autoep_size=4 does not divide the 2 ranks.*fit here: 1, 2$"),
        ({"autoep_size": 0}, MOE, 2, "autoep_size is 0; use a positive number or 'auto'"),
        ({"autoep_size": "2"}, MOE, 2, "autoep_size is '2'"),
        ({"autoep_sise": 2}, MOE, 2, "autoep_sise cannot be set.*did you mean 'autoep_size'"),
        ({"top_k": 1}, MOE, 2, "expert_parallel.top_k cannot be set.*follows from the model"),
        ([2], MOE, 2, "expert_parallel must be an object"),
    ],
)
def test_an_invalid_section_is_rejected(
    section: Any, moe: MoEConfig | None, world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        complete_section({"expert_parallel": section}, moe, world_size)


def test_the_section_is_completed_from_the_model() -> None:
    for ranks, size in ((1, 1), (2, 2), (6, 2), (8, 4)):
        completed = complete_section({"expert_parallel": {"autoep_size": "auto"}}, MOE, ranks)
        section = completed["expert_parallel"]
        assert section["autoep_size"] == size
        assert section["enabled"] and section["top_k"] == 2 and section["route_norm"]


def test_a_disabled_section_is_dropped() -> None:
    off = {"zero_optimization": {"stage": 1}, "expert_parallel": {"enabled": False}}
    assert complete_section(off, None, 2) == {"zero_optimization": {"stage": 1}}


def test_mistakes_are_found_before_a_process_group_starts(text_data: Path, tmp_path: Path) -> None:
    two = Ranks(rank=0, local_rank=0, world_size=2)
    dense = Request(thinker_config(text_data), tmp_path, tmp_path, engine(2, 2))
    with pytest.raises(ConfigError, match="no experts"):
        prepare(dense, two)
    wide = Request(moe_config(text_data), tmp_path, tmp_path, engine(2, 4))
    with pytest.raises(ConfigError, match="does not divide the 2 ranks"):
        prepare(wide, two)


# -- metrics ---------------------------------------------------------------------------------------


def test_load_of_each_layer_is_logged(alone: dict[str, Any]) -> None:
    lines = (alone["run"] / "thinker" / "metrics.jsonl").read_text().splitlines()
    train_lines = [line for line in map(json.loads, lines) if line["kind"] == "train"]
    assert len(train_lines) == 10
    for line in train_lines:
        for layer in (0, 1):
            loads = [line[f"moe/layer{layer}/load/{expert}"] for expert in range(4)]
            assert sum(loads) == pytest.approx(1)
            assert max(loads) * 4 == pytest.approx(line[f"moe/layer{layer}/max_load"])
            assert 1 <= line[f"moe/layer{layer}/max_load"] <= 2
            assert 0 < line[f"moe/layer{layer}/entropy"] <= 1 + 1e-9
            assert line[f"moe/layer{layer}/num_dead"] in (0, 1, 2)
        assert math.isfinite(line["moe/z_loss"])
