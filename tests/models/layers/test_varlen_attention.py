"""Attention by document against attention by mask.

CPUs do not have the kernels. A stand-in with their interface shows there that a Thinker asks for the right
thing, and so do encoders and Talkers with padded rows; the test with the marker `gpu` asks the kernels.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from muomni.config.models import AudioEncoderConfig, ThinkerConfig
from muomni.data.sampling.packing import document_starts, longest_document
from muomni.models.language.thinker import Thinker
from muomni.models.layers import attention
from muomni.models.layers.masks import padded_starts
from muomni.models.layers.transformer import init_weights
from muomni.models.speech.audio_encoder import AudioEncoder
from muomni.models.speech.talker import Talker
from tests.models.speech.test_talker import make_talker

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
    """Reference of `varlen_attn`: attention of [T, H, D] within cu_seq[i] to cu_seq[i + 1]."""
    assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k)
    # (-1, -1) would select cuDNN.
    is_causal = {(-1, 0): True, (max_q, max_k): False}[window_size]
    assert enable_gqa == (query.shape[1] != key.shape[1])
    lengths = cu_seq_q.diff()
    assert cu_seq_q[0] == 0 and cu_seq_q[-1] == len(query)
    # Only the pads at the end are empty documents.
    num_documents = int((cu_seq_q < len(query)).sum())
    assert (lengths[:num_documents] > 0).all() and not lengths[num_documents:].any()
    assert max_q == max_k >= int(lengths.max())
    parts = []
    for one_query, one_key, one_value in zip(
        *(tensor.split(lengths.tolist()) for tensor in (query, key, value)), strict=True
    ):
        heads = [t.transpose(0, 1)[None] for t in (one_query, one_key, one_value)]
        if len(one_query):
            mixed = F.scaled_dot_product_attention(
                *heads, is_causal=is_causal, enable_gqa=enable_gqa
            )
            parts.append(mixed[0].transpose(0, 1))
    return torch.cat(parts)


def states_and_gradients(thinker: Thinker, by_documents: bool, device: str) -> list[Tensor]:
    """The states of real positions, and the gradients of all weights."""
    ids = DOCUMENT_IDS.to(device)
    starts = torch.from_numpy(document_starts(DOCUMENT_IDS.numpy())).to(device)
    torch.manual_seed(2)
    tokens = torch.randint(0, 61, DOCUMENT_IDS.shape).to(device)
    thinker.stack.attends_by_documents = by_documents
    thinker.zero_grad()
    longest = longest_document(starts.cpu().numpy())
    states = thinker(tokens, document_ids=ids, document_starts=starts, longest_document=longest)[
        ids > 0
    ]
    (states.float() ** 2 * torch.arange(32, device=device)).sum().backward()
    gradients = [p.grad for p in thinker.parameters() if p.grad is not None]
    return [states.detach(), *gradients]


@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_states_and_gradients_match_the_mask(
    num_kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def stand_in(*args: Tensor, **kwargs: object) -> Tensor:
        calls.append(args[0].shape)
        return attend_to_each(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    thinker = make_thinker(num_kv_heads).double()
    expected = states_and_gradients(thinker, by_documents=False, device="cpu")
    assert not calls
    found = states_and_gradients(thinker, by_documents=True, device="cpu")
    assert calls == [(DOCUMENT_IDS.numel(), 4, 16)] * 2
    assert len(found) == len(expected) > 20
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


def test_without_starts_the_mask_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> Tensor:
        raise AssertionError("called without document starts")

    monkeypatch.setattr(attention, "varlen_attn", refuse)
    thinker = make_thinker(4)
    thinker.stack.attends_by_documents = True
    tokens = torch.zeros_like(DOCUMENT_IDS)
    assert thinker(tokens, document_ids=DOCUMENT_IDS).isfinite().all()
    assert thinker(tokens).isfinite().all()


@given(rows=st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=20))
def test_starts_split_sequences_into_documents(rows: list[list[int]]) -> None:
    ids = np.array(rows)
    starts = document_starts(ids)
    assert starts.dtype == np.int32 and len(starts) % 64 == 0
    assert starts[0] == 0 and starts[-1] == ids.size and (np.diff(starts) >= 0).all()
    longest = longest_document(starts)
    assert longest & (longest - 1) == 0 and longest / 2 < np.diff(starts).max() <= longest
    flat = ids.ravel()
    for start, end in itertools.pairwise(starts):
        assert len(set(flat[start:end].tolist())) <= 1 and end - start <= 9
        is_at_row = end % 9 == 0
        assert end == start or end == ids.size or is_at_row or flat[end] != flat[start]


# -- padded rows -----------------------------------------------------------------------------------


def heard(encoder: AudioEncoder, num_samples: int = 16_000) -> Tensor:
    """States of audio clips, one of them empty and one of `num_samples`, as long as the batch."""
    lengths = torch.tensor([3000, num_samples, 0, 9000])
    waveform = torch.randn(4, num_samples, generator=torch.Generator().manual_seed(3))
    device = next(encoder.parameters()).device
    return encoder(waveform.to(device), lengths.to(device))[0]


def spoken(talker: Talker) -> Tensor:
    """Logits at real frames; there is padding between characters and frames, and before some characters."""
    generator = torch.Generator().manual_seed(3)
    is_character = torch.arange(7) < torch.tensor([[7], [2], [4], [0]])
    is_character[2] = is_character[2].flip(0)
    is_frame = torch.arange(9) < torch.tensor([[4], [9], [1], [0]])
    batch = {
        "text_ids": torch.randint(0, 30, (4, 7), generator=generator),
        "character_ids": torch.randint(97, 123, (4, 7), generator=generator),
        "text_mask": is_character,
        "codes": torch.randint(0, 11, (4, 9, 2), generator=generator),
        "code_mask": is_frame,
    }
    device = next(talker.parameters()).device
    output = talker(**{name: tensor.to(device) for name, tensor in batch.items()})
    is_frame = is_frame.to(device)
    # The state before each frame speaks it, the last one the stop.
    return torch.cat(
        [output.base[:, :-1][is_frame].flatten(), output.residual[0][is_frame].flatten()]
    )


@pytest.mark.parametrize("kernel_size", [0, 5])
def test_an_audio_encoder_matches_the_mask(
    kernel_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = AudioEncoderConfig(
        hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, intermediate_size=48,
        vocab_size=11, conv_channels=4, conv_kernel_size=kernel_size,
    )  # fmt: skip
    torch.manual_seed(1)
    model = AudioEncoder(config).double()
    check_padded(model, lambda: heard(model), monkeypatch)


def test_a_talker_matches_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_talker(dropout=0.0).double()
    check_padded(model, lambda: spoken(model), monkeypatch)


def check_padded(model: Any, output: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients equal those of the mask; each layer calls the kernel once."""
    num_calls = 0

    def stand_in(*args: Tensor, **kwargs: Any) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return attend_to_each(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(attention, "varlen_attn", stand_in)
    found = []
    for by_documents in (False, True):
        model.stack.attends_by_documents = by_documents
        model.zero_grad()
        result = output()
        (result**2).sum().backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        found.append([result.detach(), *gradients])
    assert num_calls == len(model.stack.blocks)
    assert found[0][0].abs().max() > 0.1 and len(found[0]) == len(found[1])
    for by_mask, by_documents in zip(*found, strict=True):
        torch.testing.assert_close(by_documents, by_mask, atol=1e-9, rtol=1e-9)


@given(
    num_columns=st.integers(1, 9),
    rows=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=9),
)
def test_padded_starts_separate_padding(num_columns: int, rows: list[tuple[int, int]]) -> None:
    column = torch.arange(num_columns)
    valid = torch.stack([(column >= begin) & (column < begin + num) for begin, num in rows])
    starts = padded_starts(valid)
    assert starts.dtype == torch.int32
    parts = [part for part in valid.flatten().split(starts.diff().tolist()) if len(part)]
    assert starts[0] == 0 and sum(map(len, parts)) == valid.numel()
    assert all(part.all() or not part.any() for part in parts)
    assert (starts.diff()[: len(parts)] > 0).all()  # empty documents are at the end
    at_sequences = set(range(0, valid.numel(), num_columns))
    assert at_sequences <= set(starts.tolist())


# -- the kernels -----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_flash_kernels_match_the_mask(num_kv_heads: int, dtype: torch.dtype) -> None:
    thinker = make_thinker(num_kv_heads).to("cuda", dtype)
    expected = states_and_gradients(thinker, by_documents=False, device="cuda")
    found = states_and_gradients(thinker, by_documents=True, device="cuda")
    for one, other in zip(found, expected, strict=True):
        difference = (one.float() - other.float()).norm() / other.float().norm().clamp(min=1e-6)
        assert difference < 0.03


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["encoder", "talker"])
def test_flash_kernels_match_the_mask_on_padded_batches(part: str) -> None:
    if part == "talker":
        # A head_dim that the kernels have.
        model: Any = make_talker(dropout=0.0).to("cuda", torch.bfloat16)
    else:
        config = AudioEncoderConfig(
            hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16,
            intermediate_size=48, vocab_size=11, conv_channels=4,
        )  # fmt: skip
        torch.manual_seed(1)
        model = AudioEncoder(config).to("cuda", torch.bfloat16)
        model.log_mel.float()
    outputs = []
    for by_documents in (False, True):
        model.stack.attends_by_documents = by_documents
        # 250 frames: torch uses cuDNN, if at all, beyond 128.
        output = spoken(model) if part == "talker" else heard(model, num_samples=160_000)
        outputs.append(output.float())
    assert (outputs[1] - outputs[0]).norm() / outputs[0].norm() < 0.03
