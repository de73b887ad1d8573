"""Learning-rate schedules and parameter groups."""

import itertools

import pytest
from torch import nn

from muomni.config.run import OptimSection
from muomni.errors import ConfigError
from muomni.training.optim.groups import describe_parameters, parameter_groups
from muomni.training.optim.schedule import lr_factor


def test_warmup_then_cosine_to_the_floor() -> None:
    optim = OptimSection(lr=1.0, warmup_fraction=0.1, final_lr_fraction=0.2)
    factors = [lr_factor(step, 100, optim) for step in range(100)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[10] == pytest.approx(1.0)
    assert factors[-1] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))


def test_constant_schedule() -> None:
    optim = OptimSection(lr=1.0, schedule="constant", warmup_fraction=0.0)
    assert {lr_factor(step, 50, optim) for step in range(50)} == {1.0}


def test_a_run_of_one_step_has_a_rate() -> None:
    optim = OptimSection(lr=1.0, warmup_fraction=0.0)
    assert lr_factor(0, 1, optim) == 1.0


@pytest.mark.parametrize(("shape", "half_way"), [("1-sqrt", 1 - 0.5**0.5), ("linear", 0.5)])
def test_wsd_warms_up_and_decays_over_its_last_fraction(shape: str, half_way: float) -> None:
    optim = OptimSection.model_validate({
        "lr": 1.0, "schedule": "wsd", "warmup_fraction": 0.1, "decay_fraction": 0.2, "decay_shape": shape,
        "final_lr_fraction": 0.0,
    })  # fmt: skip
    factors = [lr_factor(step, 100, optim) for step in range(100)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert set(factors[10:80]) == {1.0}
    assert factors[80] < 1.0
    assert factors[89] == pytest.approx(half_way)
    assert factors[-1] == 0.0


def test_wsd_has_the_same_rates_before_its_decay_for_any_run_length() -> None:
    """A checkpoint of the stable phase can continue in a longer run."""
    optim = OptimSection(lr=1.0, schedule="wsd", warmup_fraction=0.0)
    short = [lr_factor(step, 100, optim) for step in range(80)]
    assert short == [lr_factor(step, 300, optim) for step in range(80)]


SCHEDULES = [
    OptimSection.model_validate(
        {"lr": 1.0, "schedule": schedule, "decay_shape": shape, **fractions}
    )
    for schedule, shape in (
        ("cosine", "linear"), ("constant", "linear"), ("wsd", "linear"), ("wsd", "1-sqrt"),
    )
    for fractions in (
        {},
        {"warmup_fraction": 0.0},
        {"warmup_fraction": 0.5, "decay_fraction": 0.5},
        {"warmup_fraction": 0.0, "decay_fraction": 1.0, "final_lr_fraction": 0.01},
        {"warmup_fraction": 0.3, "decay_fraction": 0.0},
        {"final_lr_fraction": 1.0},
    )
]  # fmt: skip


@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 20, 101, 1000])
@pytest.mark.parametrize("optim", SCHEDULES)
def test_every_schedule_stays_within_its_bounds(optim: OptimSection, num_steps: int) -> None:
    factors = [lr_factor(step, num_steps, optim) for step in range(num_steps)]
    assert all(0 < factor <= 1 for factor in factors)
    assert max(factors) == 1.0
    has_decay = optim.schedule == "cosine" or (optim.schedule == "wsd" and optim.decay_fraction > 0)
    if num_steps >= 7:
        last = optim.final_lr_fraction if has_decay else 1.0
        assert factors[-1] == pytest.approx(last)
    peak = factors.index(1.0)
    assert all(a <= b for a, b in itertools.pairwise(factors[: peak + 1]))
    assert all(a >= b for a, b in itertools.pairwise(factors[peak:]))


@pytest.mark.parametrize("optim", SCHEDULES)
def test_every_schedule_is_continuous(optim: OptimSection) -> None:
    """The largest jump between neighboring steps shrinks with the number of steps."""
    for num_steps, largest in ((1_000, 0.1), (100_000, 0.01)):
        factors = [lr_factor(step, num_steps, optim) for step in range(num_steps)]
        assert max(abs(a - b) for a, b in itertools.pairwise(factors)) <= largest


def test_warmup_and_decay_share_the_steps() -> None:
    with pytest.raises(ValueError, match="must not exceed 1"):
        OptimSection(lr=1.0, schedule="wsd", warmup_fraction=0.5, decay_fraction=0.6)


def test_vectors_embeddings_and_frozen_parameters_do_not_decay() -> None:
    module = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    module[3].requires_grad_(False)
    decayed, plain = parameter_groups(module, OptimSection(lr=1.0, weight_decay=0.1))
    assert [p is module[1].weight for p in decayed.parameters] == [True]
    assert decayed.weight_decay == 0.1 and plain.weight_decay == 0.0
    assert len(plain.parameters) == 4


def test_rates_follow_the_first_matching_pattern() -> None:
    talker, thinker = nn.Linear(3, 4), nn.Linear(4, 2)
    task = nn.ModuleDict({"omni": nn.ModuleDict({"talker": talker, "thinker": thinker})})
    optim = OptimSection(lr=0.1, lr_scales={"talker.bias": 0.5, "talker.*": 0.25})
    groups = parameter_groups(task, optim)
    rates = {id(p): group.lr for group in groups for p in group.parameters}
    assert rates[id(talker.weight)] == pytest.approx(0.025)
    assert rates[id(talker.bias)] == pytest.approx(0.05)
    assert rates[id(thinker.weight)] == rates[id(thinker.bias)] == 0.1


def test_a_pattern_without_a_match_is_rejected() -> None:
    task = nn.ModuleDict({"omni": nn.ModuleDict({"talker": nn.Linear(3, 4)})})
    with pytest.raises(ConfigError, match=r"'taker\.\*'.*talker"):
        parameter_groups(task, OptimSection(lr=0.1, lr_scales={"taker.*": 0.5}))


def test_groups_and_frozen_parts_are_described_with_their_counts() -> None:
    parts = {"talker": nn.Linear(300, 4), "thinker": nn.Linear(4, 2), "tower": nn.Linear(5, 5)}
    task = nn.ModuleDict({"omni": nn.ModuleDict(parts)})
    parts["tower"].weight.requires_grad_(False)
    optim = OptimSection(lr=0.1, weight_decay=0.3, lr_scales={"talker.*": 0.25})
    assert describe_parameters(task, optim) == [
        "optimizes matrices of all else: 8 parameters, lr 0.1, weight decay 0.3",
        "optimizes matrices of talker.*: 1,200 parameters, lr 0.025, weight decay 0.3",
        "optimizes vectors and embeddings of all else: 7 parameters, lr 0.1, weight decay 0",
        "optimizes vectors and embeddings of talker.*: 4 parameters, lr 0.025, weight decay 0",
        "freezes tower.*: 25 of 30 parameters",
    ]
