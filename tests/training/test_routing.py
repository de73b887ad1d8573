"""Router losses as part of a term, and expert load from running sums to figures."""

import math

import pytest
import torch

from muomni.config.models import AudioEncoderConfig, MoEConfig, OmniConfig, ThinkerConfig
from muomni.config.models import VisionTowerConfig as VisionConfig
from muomni.training.routing import find_moe, load_figures, router_term
from muomni.training.window import RunningSums

MOE = MoEConfig(num_experts=4, num_experts_per_token=2, expert_intermediate_size=8)
STACK = {
    "hidden_size": 8, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 4,
    "intermediate_size": 8,
}  # fmt: skip


def test_term_over_its_weight_is_the_mean_router_loss() -> None:
    logits = [torch.randn(10, 4) for _ in range(3)]
    is_real = torch.arange(10).view(2, 5) < 7
    term, logs = router_term(logits, MOE, is_real, torch.tensor(123.0))
    balance, z = (logs[name][0] / logs[name][1] for name in ("moe/balance_loss", "moe/z_loss"))
    expected = MOE.balance_loss_weight * balance + MOE.z_loss_weight * z
    torch.testing.assert_close(term / 123, expected)
    assert logs["moe/balance_loss"][1] == 7


def test_padding_alone_adds_nothing() -> None:
    term, _ = router_term(
        [torch.randn(4, 4)], MOE, torch.zeros(4, dtype=torch.bool), torch.zeros(())
    )
    assert term == 0


def test_load_is_counted_over_real_tokens_and_summed_before_it_is_judged() -> None:
    """Two micro-batches that each use two experts of four: together none is dead."""
    sums = RunningSums()
    for first in (0, 2):
        logits = torch.zeros(6, 4)
        logits[:, first : first + 2] = 5.0
        logits[5] = torch.tensor([9.0, 0.0, 0.0, 8.0])  # padding
        _, logs = router_term([logits, -logits], MOE, torch.arange(6) < 5, torch.tensor(5.0))
        sums.add(logs)
    figures = load_figures(sums.take() | {"loss": 1.0})
    assert figures["loss"] == 1.0
    assert not [name for name in figures if "load." in name]
    for layer in (0, 1):
        assert figures[f"moe/layer{layer}/max_load"] == pytest.approx(1.0)
        assert figures[f"moe/layer{layer}/entropy"] == pytest.approx(1.0)
        assert figures[f"moe/layer{layer}/num_dead"] == 0


def test_figures_name_the_worst_layer() -> None:
    shares = {
        "moe/layer0/load.0": 0.25, "moe/layer0/load.1": 0.25, "moe/layer0/load.2": 0.25,
        "moe/layer0/load.3": 0.25, "moe/layer1/load.0": 0.5, "moe/layer1/load.1": 0.5,
        "moe/layer1/load.2": 0.0, "moe/layer1/load.3": 0.0,
    }  # fmt: skip
    figures = load_figures(shares)
    assert figures["moe/layer1/max_load"] == figures["moe/max_load"] == 2.0
    assert figures["moe/layer1/num_dead"] == figures["moe/num_dead"] == 2
    assert figures["moe/layer1/entropy"] == pytest.approx(math.log(2) / math.log(4))


def test_vector_pairs_become_numbered_ratios() -> None:
    sums = RunningSums()
    for _ in range(2):
        sums.add({"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[1.0, 2.0], [2.0, 2.0]])})
    assert sums.take() == {"a": 0.75, "b.0": 0.5, "b.1": 1.0}


def test_a_mixture_is_found_also_inside_a_whole_model() -> None:
    dense = ThinkerConfig(vocab_size=9, **STACK)
    sparse = dense.model_copy(update={"moe": MOE})
    audio = AudioEncoderConfig(vocab_size=9, **STACK)
    vision = VisionConfig(**STACK)
    assert find_moe(dense) is None
    assert find_moe(sparse) == MOE
    assert find_moe(OmniConfig(thinker=sparse, audio_encoder=audio, vision_encoder=vision)) == MOE
    assert find_moe(OmniConfig(thinker=dense, audio_encoder=audio, vision_encoder=vision)) is None
