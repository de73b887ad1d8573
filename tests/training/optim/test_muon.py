"""Muon matches a plain reference on hidden matrices; unsupported settings are refused."""

import math
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muomni.config.loading import run_config
from muomni.config.run import OptimSection, RunConfig
from muomni.data.loading.loader import PlannedDataset
from muomni.distributed.discovery import discover
from muomni.errors import CheckpointError, ConfigError
from muomni.models.layers.blocks import BlockRunner
from muomni.training.optim.groups import describe_parameters, parameter_groups
from muomni.training.optim.muon import MuonWithAdamW
from muomni.training.optim.schedule import lr_factor
from muomni.training.session import Request, prepare, seed_everything
from tests.models.accelerator import accelerated
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train

MUON = {"name": "muon", "lr": 3e-3, "muon_lr": 6e-3, "muon_momentum": 0.9, "weight_decay": 0.1}
LOSS_WEIGHTS = (3.4445, -4.7750, 2.0315)


def orthogonalized(update: Tensor) -> Tensor:
    """Five steps of the quintic Newton-Schulz iteration of Jordan et al. (2024), in bf16."""
    a, b, c = LOSS_WEIGHTS
    is_tall = update.shape[0] > update.shape[1]
    x = (update.T if is_tall else update).bfloat16()
    x = x / x.norm()
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if is_tall else x).float()


def reference_losses(config: RunConfig, num_steps: int) -> list[float]:
    """Muon by its definition on matrices of blocks, torch's AdamW on the rest, without an engine."""
    session = prepare(Request(config, Path(), Path(), {}, "never"), discover({}))
    seed_everything(config.seed)
    task = session.stage.build()
    names = dict(task.named_parameters())
    hidden = {n: p for n, p in names.items() if ".blocks." in n and p.ndim == 2}
    vectors = [p for n, p in names.items() if p.ndim < 2 or n.endswith("embed_tokens.weight")]
    rest = [p for n, p in names.items() if n not in hidden and not any(p is v for v in vectors)]
    groups = [
        {"params": vectors, "weight_decay": 0.0},
        *([{"params": rest, "weight_decay": config.optim.weight_decay}] if rest else []),
    ]
    adamw = torch.optim.AdamW(groups, betas=config.optim.betas, eps=config.optim.eps)
    momenta = {name: torch.zeros_like(p) for name, p in hidden.items()}
    dataset = PlannedDataset(session.planned.source, session.stage.view(), config.seed)
    beta, decay = config.optim.muon_momentum, config.optim.weight_decay
    losses = []
    for step in range(num_steps):
        batches = [dataset[micro].tensors for micro in session.planned.plan.rank_step(step, 0, 1)]
        counts = [session.stage.loss_denominators(batch)["loss"] for batch in batches]
        losses_of_step = [task(batch).losses["loss"] for batch in batches]
        total = reduce(torch.add, losses_of_step) / reduce(torch.add, counts)
        total.backward()
        nn.utils.clip_grad_norm_(task.parameters(), config.optim.max_grad_norm)
        factor = lr_factor(step, session.num_steps, config.optim)
        for group in adamw.param_groups:
            group["lr"] = config.optim.lr * factor
        adamw.step()
        with torch.no_grad():
            for name, p in hidden.items():
                assert p.grad is not None
                momenta[name] = beta * momenta[name] + (1 - beta) * p.grad
                update = orthogonalized((1 - beta) * p.grad + beta * momenta[name])
                lr = (config.optim.muon_lr or config.optim.lr) * factor
                p.mul_(1 - lr * decay)
                p.sub_(update * lr * 0.2 * math.sqrt(max(p.shape)))
        task.zero_grad()
        losses.append(total.item())
    return losses


@pytest.fixture(scope="module")
def muon_config(text_data: Path) -> RunConfig:
    changes: dict[str, Any] = {"optim": MUON, "training": {"max_steps": 12, "save_every": 6}}
    return thinker_config(text_data, changes)


@pytest.fixture(scope="module")
def reference(muon_config: RunConfig) -> list[float]:
    return reference_losses(muon_config, 12)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_muon_follows_its_definition_and_resumes_bit_for_bit(
    num_ranks: int,
    muon_config: RunConfig,
    reference: list[float],
    tmp_path: Path,
    one_rank: RankPool,
    two_ranks: RankPool,
) -> None:
    pool = one_rank if num_ranks == 1 else two_ranks
    common = {"config": muon_config, "zero": "zero0"}
    straight = pool.run(train, run=tmp_path / "straight", **common)[0]
    assert straight["losses"] == pytest.approx(reference, abs=1e-3)
    assert straight["losses"][-1] < straight["losses"][0] - 0.5
    earlier = tmp_path / "straight" / "thinker" / "checkpoints" / "step_00000006"
    resumed = pool.run(train, run=tmp_path / "on", resume=str(earlier), **common)[0]
    assert resumed["losses"] == straight["losses"][6:]


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 0.1), ("fp16", 0.05)])
def test_muon_in_16_bits_follows(
    precision: str,
    tolerance: float,
    muon_config: RunConfig,
    reference: list[float],
    tmp_path: Path,
    one_rank: RankPool,
) -> None:
    half = {"precision": precision, "fp16": {"initial_scale_power": 8}}
    config = run_config({**muon_config.model_dump(), **half})
    result = one_rank.run(train, config=config, run=tmp_path, zero="zero0")[0]
    assert result["losses"] == pytest.approx(reference, abs=tolerance)


def test_a_checkpoint_of_the_other_optimizer_is_rejected(
    muon_config: RunConfig, text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    adamw = thinker_config(text_data, {"training": {"max_steps": 2}})
    one_rank.run(train, config=adamw, run=tmp_path, zero="zero0")
    with pytest.raises(CheckpointError, match=r"optimizer adamw, this run has .*optimizer muon"):
        one_rank.run(train, config=muon_config, run=tmp_path, zero="zero0")


@pytest.mark.parametrize(
    ("engine_json", "message"),
    [
        ({"zero_optimization": {"stage": 2}}, r"runs without ZeRO.*stage 2.*zero0\.json"),
        ({"expert_parallel": {"autoep_size": 1}}, "does not work with expert_parallel"),
    ],
)
def test_an_engine_that_cannot_run_muon_is_rejected_before_the_start(
    engine_json: dict[str, Any], message: str, muon_config: RunConfig, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(Request(muon_config, tmp_path, tmp_path, engine_json), discover({}))


def test_a_model_without_hidden_matrices_and_a_rate_without_muon_are_rejected() -> None:
    depthwise = nn.ModuleDict({"codec": blocks(nn.Conv1d(4, 4, 3, groups=4))})
    with pytest.raises(
        ConfigError, match="found no trainable linear layer or convolution in the stacks"
    ):
        parameter_groups(depthwise, OptimSection(lr=0.1, name="muon"))
    with pytest.raises(ValueError, match=r"muon_lr needs optim\.name=muon"):
        OptimSection(lr=0.1, muon_lr=0.2)


def blocks(*layers: nn.Module) -> BlockRunner:
    """A stack with one block of these layers."""
    stack = BlockRunner()
    stack.blocks = nn.ModuleList([nn.Sequential(*layers)])
    return stack


def test_muon_trains_only_linear_layers_and_convolutions_in_stacks() -> None:
    layers = [
        nn.Linear(3, 4),
        nn.LayerNorm(4),
        nn.Conv1d(2, 3, 5, bias=False),
        nn.Conv1d(4, 4, 3, groups=4, bias=False),
    ]
    model = {"stack": blocks(*layers), "head": nn.Linear(4, 9), "tokens": nn.Embedding(9, 3)}
    task = nn.ModuleDict({"thinker": nn.ModuleDict(model)})
    optim = OptimSection(lr=0.1, name="muon", muon_lr=0.4, lr_scales={"stack.*": 0.5})
    assert describe_parameters(task, optim) == [
        "optimizes hidden matrices of stack.*: 42 parameters, lr 0.2, weight decay 0.1 by Muon",
        "optimizes matrices of all else: 36 parameters, lr 0.1, weight decay 0.1",
        "optimizes matrices of stack.*: 12 parameters, lr 0.05, weight decay 0.1",
        "optimizes vectors and embeddings of all else: 36 parameters, lr 0.1, weight decay 0",
        "optimizes vectors and embeddings of stack.*: 12 parameters, lr 0.05, weight decay 0",
    ]


def groups(kernel: nn.Parameter) -> list[dict[str, Any]]:
    """The kernel for Muon, and a vector without gradients for AdamW."""
    vector = nn.Parameter(torch.zeros(1))
    return [
        {"params": [kernel], "is_muon": True, "weight_decay": 0.1},
        {"params": [vector], "is_muon": False, "weight_decay": 0.0},
    ]


def test_a_convolution_kernel_is_updated_as_a_matrix_of_its_filters() -> None:
    """As Muon by its definition, also after its state was saved and loaded."""
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(6, 2, 5))
    matrix = kernel.detach().flatten(1).clone()
    momentum = torch.zeros_like(matrix)
    rates = 0.1, (0.9, 0.95), 1e-8, 0.9
    optimizer = MuonWithAdamW(groups(kernel), *rates)
    for step in range(4):
        kernel.grad = torch.randn_like(kernel)
        optimizer.step()
        gradient = kernel.grad.flatten(1)
        momentum = 0.9 * momentum + 0.1 * gradient
        update = orthogonalized(0.1 * gradient + 0.9 * momentum)
        matrix = matrix * (1 - 0.1 * 0.1) - update * 0.1 * 0.2 * math.sqrt(10)
        torch.testing.assert_close(kernel.detach().flatten(1), matrix, rtol=0, atol=5e-3)
        if step == 1:
            state = optimizer.state_dict()
            optimizer = MuonWithAdamW(groups(kernel), *rates)
            optimizer.load_state_dict(state)


@pytest.mark.parametrize("on_cpu", [True, False])
def test_a_step_with_non_finite_gradients_changes_nothing(on_cpu: bool) -> None:
    """Accelerators update and restore instead of reading the flag."""
    torch.manual_seed(0)
    matrix, vector = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(5))
    kernel = nn.Parameter(torch.randn(3, 2, 4))
    groups: list[dict[str, Any]] = [
        {"params": [matrix, kernel], "is_muon": True, "weight_decay": 0.1},
        {"params": [vector], "is_muon": False, "weight_decay": 0.0},
    ]
    optimizer = MuonWithAdamW(groups, 0.1, (0.9, 0.95), 1e-8, 0.9)
    plain = MuonWithAdamW(
        [{**group, "params": [nn.Parameter(p.detach().clone()) for p in group["params"]]} for group in groups],
        0.1, (0.9, 0.95), 1e-8, 0.9,
    )  # fmt: skip
    ours = [p for group in optimizer.param_groups for p in group["params"]]
    theirs = [p for group in plain.param_groups for p in group["params"]]
    for step in range(4):
        is_bad = step in (0, 2)
        flag = torch.tensor(float(is_bad))
        optimizer.found_inf = flag if on_cpu else accelerated(flag)  # type: ignore[attr-defined]
        before = [p.detach().clone() for p in ours]
        for one, other in zip(ours, theirs, strict=True):
            other.grad = torch.randn_like(other)
            one.grad = other.grad * float("nan") if is_bad else other.grad.clone()
        optimizer.step()
        if is_bad:
            assert all(torch.equal(p, old) for p, old in zip(ours, before, strict=True))
        else:
            plain.step()
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
