"""Router losses, bias updates from the load of a step, and load metrics."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muomni.config.models import AudioEncoderConfig, MoEConfig, OmniConfig, ThinkerConfig
from muomni.config.models import VisionTowerConfig as VisionConfig
from muomni.models.layers.losses import router_losses
from muomni.models.layers.moe import MoEBlock, choice_biases
from muomni.training.moe import (
    TERM,
    add_router_term,
    find_moe,
    load_metrics,
    router_denominator,
    update_biases,
)
from muomni.training.outputs import StageOutput
from muomni.training.step_reduction import RunningSums

MOE = MoEConfig.model_validate(
    {"num_experts": 4, "num_experts_per_token": 2, "expert_intermediate_size": 8}
)
STACK: dict[str, Any] = {
    "hidden_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4,
    "intermediate_size": 8,
}  # fmt: skip


class Model(nn.Module):
    """A minimal model: MoE layers whose weights are unused."""

    def __init__(self, moe: MoEConfig, num_layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MoEBlock(3, moe) for _ in range(num_layers))


def changed(**changes: object) -> MoEConfig:
    return MoEConfig.model_validate({**MOE.model_dump(), **changes})


def one_pass(moe: MoEConfig, model: Model, logits: list[Tensor], is_real: Tensor) -> StageOutput:
    output = StageOutput({})
    add_router_term(output, moe, model, logits, is_real)
    return output


@pytest.mark.parametrize("balance", ["loss", "bias", "none"])
def test_the_term_sums_the_router_losses_over_real_tokens(balance: str) -> None:
    moe = changed(balance=balance)
    logits = [torch.randn(10, 4) for _ in range(3)]
    is_real = torch.arange(10).view(2, 5) < 7
    output = one_pass(moe, Model(moe, 3), logits, is_real)
    losses = router_losses(logits, 2, is_real)
    expected = moe.z_loss_weight * losses.z
    if balance == "loss":
        expected += moe.balance_loss_weight * losses.balance
    torch.testing.assert_close(output.losses[TERM], expected)
    assert router_denominator({"document_ids": is_real.long()})[TERM] == 7
    assert output.logs["moe/balance_loss"].tolist() == [losses.balance, 7]
    assert (output.state != {}) == (balance == "bias")


def _biases(model: nn.Module) -> torch.Tensor:
    return torch.stack([bias for bias in choice_biases(model) if bias is not None])


def test_the_term_does_not_depend_on_the_split_into_micro_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 12, 4, generator=generator)
    is_real = torch.arange(12) < torch.tensor([[11], [5], [12]])
    model = Model(MOE, 1)
    together = one_pass(MOE, model, [logits.flatten(0, 1)], is_real).losses[TERM]
    apart = [one_pass(MOE, model, [logits[i]], is_real[i : i + 1]).losses[TERM] for i in range(3)]
    torch.testing.assert_close(torch.stack(apart).sum(), together)
    # A balance over all tokens at once is a different loss.
    joined = one_pass(MOE, model, [logits.flatten(0, 1)], is_real.view(1, -1)).losses[TERM]
    assert abs(joined - together) > 1e-3 * together


def test_padding_alone_adds_nothing() -> None:
    moe = changed(balance="bias")
    model = Model(moe, 1)
    output = one_pass(moe, model, [torch.randn(4, 4)], torch.zeros(4, dtype=torch.bool))
    assert output.losses[TERM] == 0
    update_biases(moe, model, output.state)
    assert not _biases(model).any()


def test_biases_move_toward_idle_experts_by_their_rate() -> None:
    moe = changed(balance="bias", bias_update_rate=0.01)
    model = Model(moe, 2)
    load = torch.tensor([[3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 4.0, 4.0]])
    for _ in range(3):
        update_biases(moe, model, {"expert_load": load})
    expected = 0.03 * torch.tensor([[-1.0, 1.0, 0.0, 0.0], [1.0, 1.0, -1.0, -1.0]])
    torch.testing.assert_close(_biases(model), expected)
    model.blocks[0].gate.requires_grad_(False)
    update_biases(moe, model, {"expert_load": load})
    first, second = choice_biases(model)
    torch.testing.assert_close(first, expected[0])
    torch.testing.assert_close(second, 4 / 3 * expected[1])


def test_load_counts_real_tokens_and_is_summed_before_metrics() -> None:
    """Two micro-batches each use two of four experts: together none is dead."""
    sums, model = RunningSums(), Model(MOE, 2)
    for first in (0, 2):
        logits = torch.zeros(6, 4)
        logits[:, first : first + 2] = 5.0
        logits[5] = torch.tensor([9.0, 0.0, 0.0, 8.0])  # padding
        sums.add(one_pass(MOE, model, [logits, -logits], torch.arange(6) < 5).logs)
    metrics = load_metrics(sums.take() | {"loss": 1.0})
    assert metrics["loss"] == 1.0
    assert not [name for name in metrics if "load." in name]
    for layer in (0, 1):
        assert [metrics[f"moe/layer{layer}/load/{e}"] for e in range(4)] == [0.25] * 4
        assert metrics[f"moe/layer{layer}/max_load"] == pytest.approx(1.0)
        assert metrics[f"moe/layer{layer}/entropy"] == pytest.approx(1.0)
        assert metrics[f"moe/layer{layer}/num_dead"] == 0


def test_metrics_name_the_worst_layer() -> None:
    shares = {
        f"moe/layer{layer}/load.{expert}": share
        for layer, load in enumerate(([0.25] * 4, [0.5, 0.5, 0.0, 0.0]))
        for expert, share in enumerate(load)
    }
    metrics = load_metrics(shares)
    assert metrics["moe/layer1/max_load"] == metrics["moe/max_load"] == 2.0
    assert metrics["moe/layer1/num_dead"] == metrics["moe/num_dead"] == 2
    entropy = math.log(2) / math.log(4)
    assert metrics["moe/layer1/entropy"] == metrics["moe/entropy"] == pytest.approx(entropy)


def test_vector_pairs_become_numbered_ratios() -> None:
    sums = RunningSums()
    for _ in range(2):
        sums.add({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[1.0, 2.0], [2.0, 2.0]])})
    assert sums.take() == {"a": 0.75, "b.0": 0.5, "b.1": 1.0}


def test_a_mixture_is_found_inside_a_full_model() -> None:
    dense = ThinkerConfig(vocab_size=9, **STACK)
    sparse = dense.model_copy(update={"moe": MOE})
    audio = AudioEncoderConfig(vocab_size=9, **STACK)
    vision = VisionConfig(**STACK)
    assert find_moe(dense) is None
    assert find_moe(sparse) == MOE
    parts = {"audio_encoder": audio, "vision_encoder": vision}
    assert find_moe(OmniConfig.model_validate({"thinker": sparse, **parts})) == MOE
    assert find_moe(OmniConfig.model_validate({"thinker": dense, **parts})) is None
