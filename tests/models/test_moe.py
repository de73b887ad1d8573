"""Routing, experts and the names that AutoEP relies on."""

import pytest
import torch
import torch.nn.functional as F
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

from muomni.config.models import MoEConfig, ThinkerConfig
from muomni.models.moe import MoEBlock, find_routers, from_autoep, record_router_logits
from muomni.models.thinker import Thinker

CONFIG = MoEConfig(num_experts=4, num_experts_per_token=2, expert_intermediate_size=12)


def make_block(config: MoEConfig = CONFIG) -> MoEBlock:
    torch.manual_seed(0)
    return MoEBlock(8, config)


@pytest.mark.parametrize("normalise", [True, False])
def test_output_is_the_weighted_sum_of_the_chosen_experts(normalise: bool) -> None:
    block = make_block(CONFIG.model_copy(update={"normalise_top_k": normalise}))
    x = torch.randn(2, 5, 8)
    expected = torch.zeros_like(x)
    for b in range(2):
        for t in range(5):
            scores = block.gate(x[b, t]).softmax(dim=-1)
            best = scores.topk(2)
            total = best.values.sum() if normalise else 1.0
            for score, e in zip(best.values, best.indices, strict=True):
                gate, up = F.linear(x[b, t], block.experts.gate_up_proj[e]).chunk(2)
                expert = F.linear(F.silu(gate) * up, block.experts.down_proj[e])
                expected[b, t] += score / total * expert
    torch.testing.assert_close(block(x), expected)


def test_no_token_is_dropped_when_all_choose_one_expert() -> None:
    block = make_block(CONFIG.model_copy(update={"num_experts_per_token": 1}))
    torch.nn.init.zeros_(block.gate.weight)
    block.gate.weight.data[2, 0] = 5.0
    x = torch.rand(1, 64, 8) + 0.1
    assert (block(x).abs().sum(dim=-1) > 0).all()
    assert block.tokens_per_expert.tolist() == [0, 0, 64, 0]


def test_load_counts_every_assignment_also_in_half_precision() -> None:
    block = make_block().to(torch.bfloat16)
    for _ in range(3):
        block(torch.randn(10, 100, 8, dtype=torch.bfloat16))
    assert int(block.tokens_per_expert.sum()) == 3 * 1000 * 2


def test_gradients_reach_router_and_used_experts() -> None:
    block = make_block()
    block(torch.randn(1, 3, 8)).square().sum().backward()
    assert block.gate.weight.grad.abs().sum() > 0
    used = block.tokens_per_expert > 0
    touched = block.experts.gate_up_proj.grad.abs().sum(dim=(1, 2)) > 0
    assert torch.equal(touched, used)


def test_empty_batch_passes_through() -> None:
    assert make_block()(torch.zeros(0, 5, 8)).shape == (0, 5, 8)


def make_thinker() -> Thinker:
    config = ThinkerConfig(
        vocab_size=11,
        hidden_size=8,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        intermediate_size=8,
        moe=CONFIG,
    )
    torch.manual_seed(0)
    return Thinker(config)


def test_router_logits_are_recorded_in_layer_order() -> None:
    model = make_thinker()
    assert find_routers(model) == [block.mlp.gate for block in model.stack.blocks]
    with record_router_logits(model) as logits:
        model(torch.ones(2, 5, dtype=torch.long))
    assert [tuple(layer.shape) for layer in logits] == [(10, 4)] * 3
    model(torch.ones(2, 5, dtype=torch.long))
    assert len(logits) == 3


def test_autoep_takes_the_block_over_and_gives_it_back() -> None:
    model, ids = make_thinker(), torch.randint(0, 11, (2, 7))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with record_router_logits(model) as plain_logits:
        plain = model(ids)
    section = {
        "enabled": True,
        "autoep_size": 1,
        "moe_layer_pattern": r".*blocks\.\d+\.mlp",
        "router_pattern": "gate",
        "expert_pattern": "experts",
        "expert_w1": "gate_up_proj",
        "expert_w2": "down_proj",
        "expert_w3": None,
        "num_experts_attr": "num_experts",
        "top_k_attr": "num_experts_per_token",
        "top_k": CONFIG.num_experts_per_token,
        "score_func": "softmax",
        "score_apply": "post",
        "route_norm": CONFIG.normalise_top_k,
    }
    replacer = AutoEP(model, parse_autoep_config(section))
    for spec in replacer.ep_parser():
        replacer.replace_moe_layer(spec, ep_size=1, ep_rank=0)
    assert all(isinstance(block.mlp, AutoEPMoELayer) for block in model.stack.blocks)
    with record_router_logits(model) as logits:
        torch.testing.assert_close(model(ids), plain)
    torch.testing.assert_close(logits, plain_logits)
    assert all(int(block.mlp.tokens_per_expert.sum()) == 14 * 2 for block in model.stack.blocks)
    torch.testing.assert_close(from_autoep(model.state_dict()), state)
