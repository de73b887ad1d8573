"""Routing, experts, and the names that AutoEP relies on."""

import pytest
import torch
import torch.nn.functional as F
from deepspeed.module_inject.auto_ep import AutoEP
from deepspeed.module_inject.auto_ep_config import parse_autoep_config
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

from muomni.config.models import MoEConfig, ThinkerConfig
from muomni.models.language.thinker import Thinker
from muomni.models.layers.moe import (
    Experts,
    MoEBlock,
    choice_biases,
    count_per_expert,
    find_routers,
    from_autoep,
    record_router_logits,
)
from muomni.training.engine.expert_parallel import complete_section
from tests.models.accelerator import accelerated
from tests.models.gradients import grad

CONFIG = MoEConfig(num_experts=4, num_experts_per_token=2, expert_intermediate_size=12)


def make_block(config: MoEConfig = CONFIG) -> MoEBlock:
    torch.manual_seed(0)
    return MoEBlock(8, config)


@pytest.mark.parametrize("normalize", [True, False])
def test_output_is_the_weighted_sum_of_the_chosen_experts(normalize: bool) -> None:
    block = make_block(CONFIG.model_copy(update={"normalize_top_k": normalize}))
    x = torch.randn(2, 5, 8)
    expected = torch.zeros_like(x)
    for b in range(2):
        for t in range(5):
            scores = block.gate(x[b, t]).softmax(dim=-1)
            best = scores.topk(2)
            total = best.values.sum() if normalize else 1.0
            for score, e in zip(best.values, best.indices, strict=True):
                gate, up = F.linear(x[b, t], block.experts.gate_up_proj[e]).chunk(2)
                expert = F.linear(F.silu(gate) * up, block.experts.down_proj[e])
                expected[b, t] += score / total * expert
    torch.testing.assert_close(block(x), expected)


def test_a_routing_bias_changes_the_choice_but_not_the_scores() -> None:
    block, x = make_block(CONFIG.model_copy(update={"balance": "bias"})), torch.randn(1, 6, 8)
    torch.testing.assert_close(block(x), make_block()(x))
    assert block.e_score_correction_bias is not None
    block.e_score_correction_bias[:2] = 1.0  # more than any score
    block.tokens_per_expert.zero_()
    output = block(x)
    assert block.tokens_per_expert.tolist() == [6, 6, 0, 0]
    scores = block.gate(x).softmax(dim=-1)[..., :2]
    experts = [
        block.experts(x[0], torch.tensor([6 if e == other else 0 for other in range(4)]))
        for e in range(2)
    ]
    shares = scores / scores.sum(dim=-1, keepdim=True)
    expected = sum(shares[..., e : e + 1] * experts[e] for e in range(2))
    torch.testing.assert_close(output, expected)


def test_every_token_passes_the_shared_expert() -> None:
    shared = torch.nn.Linear(8, 8)
    torch.manual_seed(0)
    block, x = MoEBlock(8, CONFIG, shared), torch.randn(2, 3, 8)
    torch.testing.assert_close(block(x), make_block()(x) + shared(x))


def test_no_token_is_dropped_when_all_use_one_expert() -> None:
    block = make_block(CONFIG.model_copy(update={"num_experts_per_token": 1}))
    torch.nn.init.zeros_(block.gate.weight)
    block.gate.weight.data[2, 0] = 5.0
    x = torch.rand(1, 64, 8) + 0.1
    assert (block(x).abs().sum(dim=-1) > 0).all()
    assert block.tokens_per_expert.tolist() == [0, 0, 64, 0]


def test_load_counts_are_exact_in_half_precision() -> None:
    block = make_block().to(torch.bfloat16)
    for _ in range(3):
        block(torch.randn(10, 100, 8, dtype=torch.bfloat16))
    assert int(block.tokens_per_expert.sum()) == 3 * 1000 * 2


def test_gradients_reach_router_and_used_experts() -> None:
    block = make_block()
    block(torch.randn(1, 3, 8)).square().sum().backward()
    assert grad(block.gate.weight).abs().sum() > 0
    used = block.tokens_per_expert > 0
    touched = grad(block.experts.gate_up_proj).abs().sum(dim=(1, 2)) > 0
    assert torch.equal(touched, used)


def test_empty_batch_passes_through() -> None:
    assert make_block()(torch.zeros(0, 5, 8)).shape == (0, 5, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_matmuls_equal_the_loop(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    experts = Experts(4, 16, 24).to(dtype)
    counts = torch.tensor([5, 0, 1, 9])
    x, weights = torch.randn(15, 16, dtype=dtype), torch.randn(15, 16, dtype=dtype)
    results = []
    for run in (experts.forward, experts.grouped):
        experts.zero_grad()
        read = x.clone().requires_grad_()
        output = run(read, counts)
        (output * weights).sum().backward()
        results.append([output, grad(read), *(grad(weight) for weight in experts.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_counts_on_an_accelerator_equal_those_of_bincount() -> None:
    chosen = torch.tensor([3, 1, 1, 0, 3, 3])
    counts = count_per_expert(accelerated(chosen), 5)
    assert counts.tolist() == count_per_expert(chosen, 5).tolist() == [1, 2, 0, 3, 0]


def make_thinker(moe: MoEConfig = CONFIG) -> Thinker:
    config = ThinkerConfig(
        vocab_size=11,
        hidden_size=8,
        num_layers=3,
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        intermediate_size=8,
        moe=moe,
    )
    torch.manual_seed(0)
    return Thinker(config)


def test_router_logits_are_recorded_in_layer_order() -> None:
    model = make_thinker()
    gates = [block.get_submodule("mlp.gate") for block in model.stack.blocks]
    assert find_routers(model) == gates
    with record_router_logits(model) as logits:
        model(torch.ones(2, 5, dtype=torch.long))
    assert [tuple(layer.shape) for layer in logits] == [(10, 4)] * 3
    model(torch.ones(2, 5, dtype=torch.long))
    assert len(logits) == 3


@pytest.mark.parametrize("changes", [{}, {"balance": "bias", "shared_intermediate_size": 6}])
def test_autoep_replaces_the_block_and_converts_back(changes: dict[str, object]) -> None:
    moe = CONFIG.model_copy(update=changes)
    model, ids = make_thinker(moe), torch.randint(0, 11, (2, 7))
    for bias in choice_biases(model):
        if bias is not None:
            bias.copy_(torch.tensor([0.3, 0.0, -0.2, 0.1]))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with record_router_logits(model) as plain_logits:
        plain = model(ids)
    section = complete_section({"expert_parallel": {"autoep_size": 1}}, moe, 1)["expert_parallel"]
    replacer = AutoEP(model, parse_autoep_config(section))
    for spec in replacer.ep_parser():
        replacer.replace_moe_layer(spec, ep_size=1, ep_rank=0)
    layers = [block.get_submodule("mlp") for block in model.stack.blocks]
    assert all(isinstance(layer, AutoEPMoELayer) for layer in layers)
    with record_router_logits(model) as logits:
        torch.testing.assert_close(model(ids), plain)
    torch.testing.assert_close(logits, plain_logits)
    counts = [layer.get_buffer("tokens_per_expert") for layer in layers]
    assert all(int(count.sum()) == 14 * 2 for count in counts)
    torch.testing.assert_close(from_autoep(model.state_dict()), state)
    assert len(choice_biases(model)) == 3
    assert [bias is None for bias in choice_biases(model)] == [moe.balance != "bias"] * 3
