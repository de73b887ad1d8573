"""Kernels and memory traffic of a Thinker micro-batch on an accelerator, without torch.compile."""

import pytest
import torch
import torch.nn.functional as F

from muomni.config.models import ThinkerConfig
from muomni.models.language.thinker import Thinker
from muomni.models.layers import attention
from tests.models.accelerator import FusedAttention, FusedNorm, KernelCount

# Preset `small`, 8 sequences of 1,024 positions.
SMALL = ThinkerConfig(
    hidden_size=768, num_layers=20, num_heads=12, num_kv_heads=4, head_dim=64, intermediate_size=2048,
    max_positions=4096, vocab_size=32_000,
)  # fmt: skip
SHAPE = (8, 1024)


@pytest.mark.parametrize(
    ("by_documents", "most_kernels", "most_bytes"), [(True, 1300, 60e9), (False, 1400, 62e9)]
)
def test_a_micro_batch_takes_few_kernels(
    by_documents: bool, most_kernels: int, most_bytes: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(F, "rms_norm", FusedNorm.apply)
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *qkv, **_: FusedAttention.apply(*qkv)
    )
    monkeypatch.setattr(
        attention, "varlen_attn", lambda *args, **_: FusedAttention.apply(*args[:3])
    )
    with torch.device("meta"):
        thinker = Thinker(SMALL).bfloat16()
        ids, starts = torch.empty(SHAPE, dtype=torch.long), torch.empty(64, dtype=torch.int32)
    thinker.stack.attends_by_documents = by_documents
    forward, loss, backward = KernelCount(), KernelCount(), KernelCount()
    with forward:
        hidden = thinker(ids, document_ids=ids, document_starts=starts)
    with loss:
        total = thinker.loss(hidden, ids).total
    with backward:
        total.backward()
    counts = [count.kernels.total() for count in (forward, loss, backward)]
    assert counts[1] <= 60 and forward.kernels["mm"] == 7 * SMALL.num_layers
    # Attention launches one kernel a layer forward, and at least one backward.
    assert sum(counts) + 2 * SMALL.num_layers <= most_kernels, counts
    num_bytes = sum(count.num_bytes for count in (forward, loss, backward))
    assert num_bytes <= most_bytes, f"{num_bytes:.3g}"
