"""An upcycled mixture of experts starts as its dense Thinker and then learns."""

from typing import Any

import pytest
import torch

from muomni.config.models import MoEConfig, ThinkerConfig
from muomni.errors import ConfigError
from muomni.models.language.thinker import Thinker
from muomni.models.language.upcycling import check_upcycling, upcycle

DENSE = ThinkerConfig(
    vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4,
    intermediate_size=12,
)  # fmt: skip
MOE = MoEConfig(num_experts=4, num_experts_per_token=2, expert_intermediate_size=12)


def sparse_config(**changes: object) -> ThinkerConfig:
    moe = MoEConfig.model_validate({**MOE.model_dump(), **changes})
    return DENSE.model_copy(update={"moe": moe, "intermediate_size": 99})


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_experts_per_token": 1}, {"shared_intermediate_size": 6}, {"balance": "bias"}],
)
def test_initial_logits_and_loss_equal_the_dense_model(changes: dict[str, object]) -> None:
    torch.manual_seed(0)
    dense, sparse = Thinker(DENSE), Thinker(sparse_config(**changes))
    upcycle(sparse, dense.state_dict())
    ids = torch.randint(0, 11, (3, 9))
    expected, hidden = dense(ids), sparse(ids)
    torch.testing.assert_close(sparse.logits(hidden), dense.logits(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        sparse.loss(hidden, ids).total, dense.loss(expected, ids).total, rtol=1e-6, atol=0
    )


def test_experts_diverge_and_the_shared_expert_learns() -> None:
    torch.manual_seed(0)
    sparse = Thinker(sparse_config(shared_intermediate_size=6))
    upcycle(sparse, Thinker(DENSE).state_dict())
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    ids = torch.randint(0, 11, (3, 9))
    for _ in range(2):
        optimizer.zero_grad()
        sparse.loss(sparse(ids), ids.roll(-1, dims=1)).total.backward()
        optimizer.step()
    block: Any = sparse.stack.blocks[0].mlp
    assert len({expert.sum().item() for expert in block.experts.down_proj}) == 4
    assert block.shared_experts.down_proj.weight.abs().sum() > 0
    assert block.shared_experts.gate_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("dense", "changes", "message"),
    [
        (sparse_config(), {}, "already has experts; name the run of a dense one"),
        (DENSE, {"expert_intermediate_size": 6}, "size 6 cannot copy .* size 12; set .*_size=12"),
        (DENSE, {"normalize_top_k": False}, "set model.moe.normalize_top_k=true"),
        (
            DENSE.model_copy(update={"num_layers": 3}),
            {},
            "with num_layers=3, but this model has 2; set model.num_layers=3",
        ),
        (DENSE.model_copy(update={"rope_theta": 5.0}), {}, "rope_theta=5.0, but .* 10000.0"),
    ],
)
def test_incompatible_sizes_are_rejected(
    dense: ThinkerConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check_upcycling(dense, sparse_config(**changes))


def test_a_model_without_experts_is_rejected() -> None:
    with pytest.raises(
        ConfigError, match=r"needs a model with experts; use a preset with model\.moe"
    ):
        check_upcycling(DENSE, DENSE)
