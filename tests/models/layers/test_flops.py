"""FLOPs of the models against torch's FLOP counter."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.utils.flop_counter import FlopCounterMode

from muomni.config.models import MoEConfig, TalkerConfig, ThinkerConfig
from muomni.models.language.thinker import Thinker
from muomni.models.layers.flops import count_parameters, forward_flops
from muomni.models.speech.talker import Talker, talker_units
from muomni.training.planning.live_bytes import LiveBytes

MOE = MoEConfig(num_experts=6, num_experts_per_token=2, expert_intermediate_size=20)
SHARED = MOE.model_copy(update={"shared_intermediate_size": 12})


def measured(run: Callable[[], object]) -> int:
    """FLOPs of `run` by torch, with attention as matrix products, which its counter supports."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def make_thinker(moe: MoEConfig | None, tied: bool = True) -> Thinker:
    return Thinker(
        ThinkerConfig(
            vocab_size=61,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            intermediate_size=48,
            tie_embeddings=tied,
            moe=moe,
        )
    )


@pytest.mark.parametrize("moe", [None, MOE, SHARED], ids=["dense", "moe", "shared"])
def test_thinker(moe: MoEConfig | None) -> None:
    model = make_thinker(moe)
    ids = torch.randint(0, 61, (3, 10))
    units = {"positions": 30, "pairs": 300, "predictions": 30}
    assert measured(lambda: model.logits(model(ids))) == forward_flops(model.flops(), units)


def test_training_costs_three_forward_passes() -> None:
    model = make_thinker(None)
    hidden = torch.randn(1, 10, 32, requires_grad=True)

    def step() -> None:
        model.logits(model(inputs_embeds=hidden)).sum().backward()

    costs = model.flops()
    counted = costs["positions"] * 10 + costs["pairs"] * 100 + costs["predictions"] * 10
    assert measured(step) == counted.model() == counted.hardware() == 3 * counted.forward


@pytest.mark.parametrize("num_codebooks", [1, 3])
def test_talker(num_codebooks: int) -> None:
    config = TalkerConfig(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        intermediate_size=64,
        text_vocab_size=30,
        num_codebooks=num_codebooks,
        codebook_size=11,
        thinker_hidden_size=16,
    )
    talker = Talker(config)

    def run() -> None:
        talker(
            torch.zeros(2, 5, dtype=torch.long),
            torch.zeros(2, 5, dtype=torch.long),
            torch.ones(2, 5),
            torch.zeros(2, 7, num_codebooks, dtype=torch.long),
            torch.ones(2, 7),
            thinker_hidden=torch.zeros(2, 5, 16),
        )

    units = talker_units(torch.tensor([5, 5]), torch.tensor([7, 7]))
    assert measured(run) == forward_flops(talker.flops(), units)


def test_active_parameters_count_only_routed_experts() -> None:
    few = MOE.model_copy(update={"num_experts": 2})
    count, smaller = count_parameters(make_thinker(MOE)), count_parameters(make_thinker(few))
    assert count.total > count.active
    # Two experts that are always chosen: the same except for the larger router.
    assert count.active == smaller.total + 2 * 32 * (6 - 2)
    assert smaller.active == smaller.total


def test_parameters_are_counted_on_the_meta_device() -> None:
    with torch.device("meta"):
        on_meta = count_parameters(make_thinker(None, tied=False))
    assert on_meta == count_parameters(make_thinker(None, tied=False))
    tied = count_parameters(make_thinker(None))
    assert on_meta.total - tied.total == 61 * 32 == tied.embedding


def test_documents_of_unknown_lengths_count_each_position_once() -> None:
    """On the meta device, many short documents must not all count as the longest one."""
    make = partial(torch.empty, dtype=torch.bfloat16, device="meta", requires_grad=True)
    query, key, value = make(64, 4, 16), make(64, 2, 16), make(64, 2, 16)
    starts = torch.zeros(40, dtype=torch.int32, device="meta")
    with LiveBytes(lambda: "", on_meta=True) as live:
        mixed = varlen_attn(
            query, key, value, starts, starts, 32, 32, window_size=(-1, 0), enable_gqa=True
        )
        assert isinstance(mixed, torch.Tensor)
        assert live.flops == 2 * (2 * 64 * 4 * 32 * 16)
        mixed.sum().backward()
    assert live.flops == 3 * 2 * (2 * 64 * 4 * 32 * 16)
