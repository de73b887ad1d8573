"""Thinker, mixture of experts and Talker learn the same under ZeRO 0 and 3, with AutoEP as without.

The output head, tied to the embeddings, and the routers are used outside their own modules' forward
pass, which is where ZeRO-3 is easily wrong.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muomni.config.models import MoEConfig, TalkerConfig, ThinkerConfig
from muomni.models.losses import router_losses
from muomni.models.moe import record_router_logits
from muomni.models.talker import Talker
from muomni.models.thinker import Thinker
from tests.ranks import RankPool

SIZES = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
}
MOE = MoEConfig(num_experts=4, num_experts_per_token=2, expert_intermediate_size=24)
EXPERT_PARALLEL = {
    "enabled": True,
    "moe_layer_pattern": r".*blocks\.\d+\.mlp",
    "router_pattern": "gate",
    "expert_pattern": "experts",
    "expert_w1": "gate_up_proj",
    "expert_w2": "down_proj",
    "expert_w3": None,
    "num_experts_attr": "num_experts",
    "top_k_attr": "num_experts_per_token",
    "top_k": 2,
    "score_func": "softmax",
    "score_apply": "post",
    "route_norm": True,
}


class ThinkerLoss(nn.Module):
    """Packed documents in, mean loss out; with a mixture also the balance of its routers."""

    def __init__(self, moe: MoEConfig | None) -> None:
        super().__init__()
        self.moe = moe
        self.thinker = Thinker(ThinkerConfig(vocab_size=40, moe=moe, **SIZES))

    def forward(self, rows: Tensor) -> Tensor:
        document_ids = (torch.arange(rows.shape[1] - 1) // 5 + 1).expand(rows.shape[0], -1)
        with record_router_logits(self.thinker) as logits:
            hidden = self.thinker(rows[:, :-1], document_ids=document_ids)
        loss = self.thinker.loss(hidden, rows[:, 1:])
        mean = loss.total / loss.weight
        if self.moe is not None:
            router = router_losses(logits, self.moe.num_experts_per_token)
            mean = mean + (0.01 * router.balance + 0.001 * router.z) / router.weight
        return mean


class TalkerLoss(nn.Module):
    """The first half of a row is text, the other its two codes a frame."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"text_vocab_size": 40, "num_codebooks": 2, "codebook_size": 40}
        self.talker = Talker(TalkerConfig(**sizes, **SIZES))

    def forward(self, rows: Tensor) -> Tensor:
        text, codes = rows[:, :8], rows[:, 8:].unflatten(1, (-1, 2))
        mask = torch.ones(codes.shape[:2])
        output = self.talker(text, text, torch.ones_like(text), codes, mask)
        loss = self.talker.loss(output, codes, mask)
        return loss.total / loss.weight


def train_losses(kind: str, zero: int, expert_parallel: int) -> list[float]:
    """Losses of five steps, averaged over the ranks."""
    import deepspeed
    import torch.distributed as dist

    torch.manual_seed(0)
    model = TalkerLoss() if kind == "talker" else ThinkerLoss(MOE if kind == "moe" else None)
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": zero},
        "gradient_clipping": 1.0,
    }
    if expert_parallel:
        config["expert_parallel"] = {**EXPERT_PARALLEL, "autoep_size": expert_parallel}
    engine, *_ = deepspeed.initialize(model=model, config=config)
    generator = torch.Generator().manual_seed(dist.get_rank())
    rows = torch.randint(0, 40, (2, 16), generator=generator)
    losses = []
    for _ in range(5):
        loss = engine(rows)
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    engine.destroy()
    return losses


@pytest.mark.parametrize("kind", ["thinker", "talker"])
def test_zero_3_learns_like_zero_0(two_ranks: RankPool, kind: str) -> None:
    plain = two_ranks.run(train_losses, kind=kind, zero=0, expert_parallel=0)[0]
    sharded = two_ranks.run(train_losses, kind=kind, zero=3, expert_parallel=0)[0]
    assert plain[-1] < plain[0] - 0.5
    assert sharded == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("zero,expert_parallel", [(3, 0), (1, 1), (1, 2), (3, 2)])
def test_mixture_learns_the_same_however_it_is_cut(
    two_ranks: RankPool, zero: int, expert_parallel: int
) -> None:
    plain = two_ranks.run(train_losses, kind="moe", zero=0, expert_parallel=0)[0]
    cut = two_ranks.run(train_losses, kind="moe", zero=zero, expert_parallel=expert_parallel)[0]
    assert plain[-1] < plain[0] - 0.5
    assert cut == pytest.approx(plain, rel=1e-3)
