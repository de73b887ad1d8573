"""Attention by document against attention by mask.

CPUs do not have the kernels. A stand-in with their interface shows there that a Thinker asks for the right
thing; the test with the marker `gpu` asks the kernels.
"""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from muomni.config.models import ThinkerConfig
from muomni.data.packing import document_starts
from muomni.models import layers
from muomni.models.layers import init_weights
from muomni.models.thinker import Thinker

# Documents, padding at the end and between, a row of padding, a row of one document.
DOCUMENT_IDS = torch.tensor(
    [
        [1] * 5 + [2] * 1 + [3] * 10,
        [1] * 7 + [0] * 9,
        [0] * 16,
        [1] * 16,
        [1] * 4 + [0] * 2 + [2] * 10,
    ]
)


def make_thinker(num_kv_heads: int) -> Thinker:
    config = ThinkerConfig(
        vocab_size=61, hidden_size=32, num_layers=2, num_heads=4, num_kv_heads=num_kv_heads,
        head_dim=16, intermediate_size=48, max_positions=64,
    )  # fmt: skip
    torch.manual_seed(1)
    thinker = Thinker(config)
    init_weights(thinker, 1, std=0.2)
    return thinker


def attend_to_each(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What `varlen_attn` says that it does: causal attention of [T, H, D] within cu_seq[i] to cu_seq[i + 1]."""
    assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    assert window_size == (-1, 0) and enable_gqa == (query.shape[1] != key.shape[1])
    lengths = cu_seq_q.diff()
    assert cu_seq_q[0] == 0 and cu_seq_q[-1] == len(query) and int(lengths.min()) >= 0
    assert max_q == max_k >= int(lengths.max())
    parts = []
    for one_query, one_key, one_value in zip(
        *(tensor.split(lengths.tolist()) for tensor in (query, key, value)), strict=True
    ):
        heads = [t.transpose(0, 1)[None] for t in (one_query, one_key, one_value)]
        if len(one_query):
            mixed = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=enable_gqa)
            parts.append(mixed[0].transpose(0, 1))
    return torch.cat(parts)


def states_and_gradients(thinker: Thinker, by_documents: bool, device: str) -> list[Tensor]:
    """The states of real positions, and the gradients of all weights by them."""
    ids = DOCUMENT_IDS.to(device)
    starts = torch.from_numpy(document_starts(DOCUMENT_IDS.numpy())).to(device)
    torch.manual_seed(2)
    tokens = torch.randint(0, 61, DOCUMENT_IDS.shape).to(device)
    thinker.attends_by_documents = by_documents
    thinker.zero_grad()
    states = thinker(tokens, document_ids=ids, document_starts=starts)[ids > 0]
    (states.float() ** 2 * torch.arange(32, device=device)).sum().backward()
    gradients = [p.grad for p in thinker.parameters() if p.grad is not None]
    return [states.detach(), *gradients]


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_states_and_gradients_are_those_of_the_mask(
    num_kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def stand_in(*args: Tensor, **kwargs: object) -> Tensor:
        calls.append(args[0].shape)
        return attend_to_each(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(layers, "varlen_attn", stand_in)
    thinker = make_thinker(num_kv_heads).double()
    expected = states_and_gradients(thinker, by_documents=False, device="cpu")
    assert not calls
    found = states_and_gradients(thinker, by_documents=True, device="cpu")
    assert calls == [(DOCUMENT_IDS.numel(), 4, 16)] * 2
    assert len(found) == len(expected) > 20
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_without_starts_it_is_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("no document was told")

    monkeypatch.setattr(layers, "varlen_attn", refuse)
    thinker = make_thinker(4)
    thinker.attends_by_documents = True
    tokens = torch.zeros_like(DOCUMENT_IDS)
    assert thinker(tokens, document_ids=DOCUMENT_IDS).isfinite().all()
    assert thinker(tokens).isfinite().all()


@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=20))
def test_starts_cut_rows_into_runs_of_one_document(rows: list[list[int]]) -> None:
    ids = np.array(rows)
    starts = document_starts(ids)
    assert starts.dtype == np.int32 and len(starts) % 64 == 0
    assert starts[0] == 0 and starts[-1] == ids.size and (np.diff(starts) >= 0).all()
    flat = ids.ravel()
    for start, end in itertools.pairwise(starts):
        assert len(set(flat[start:end].tolist())) <= 1 and end - start <= 9
        is_at_row = end % 9 == 0
        assert end == start or end == ids.size or is_at_row or flat[end] != flat[start]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_flash_kernels_give_what_the_mask_gives(num_kv_heads: int, dtype: torch.dtype) -> None:
    thinker = make_thinker(num_kv_heads).to("cuda", dtype)
    expected = states_and_gradients(thinker, by_documents=False, device="cuda")
    found = states_and_gradients(thinker, by_documents=True, device="cuda")
    for one, other in zip(found, expected, strict=True):
        difference = (one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-6)
        assert difference < 0.03
