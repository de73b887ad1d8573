"""Attention, masks, rotary positions, and the KV cache of the transformer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from muomni.config.models import TransformerConfig
from muomni.models.layers.attention import (
    RMSNorm,
    StackOptions,
    apply_rotary,
    repeat_heads,
    rotary_angles,
)
from muomni.models.layers.counter_random import position_keys
from muomni.models.layers.masks import (
    additive_mask,
    causal_padding_mask,
    document_mask,
    document_positions,
    padding_mask,
    valid_positions,
)
from muomni.models.layers.transformer import TransformerStack, init_weights
from tests.models.accelerator import accelerated
from tests.models.gradients import grad

CONFIG = TransformerConfig(
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
)
ENCODER = StackOptions(causal=False)


def make_stack(options: StackOptions | None = None) -> TransformerStack:
    torch.manual_seed(0)
    stack = TransformerStack(CONFIG, options or StackOptions())
    # Larger than at the start of training, so that attention is far from uniform.
    init_weights(stack, CONFIG.num_layers, std=0.3)
    return stack.eval()


def test_rms_norm_is_computed_in_fp32() -> None:
    norm = RMSNorm(64).to(torch.bfloat16)
    x = torch.randn(5, 64, dtype=torch.bfloat16) * 1e-3
    expected = torch.nn.functional.rms_norm(x.float(), (64,), eps=1e-6)
    assert norm(x).dtype == torch.bfloat16
    torch.testing.assert_close(norm(x).float(), expected, rtol=1e-2, atol=1e-2)


def test_rotation_depends_only_on_distance_in_bf16() -> None:
    query, key = torch.randn(2, 1, 1, 1, 16)

    def score(at: int, dtype: torch.dtype) -> Tensor:
        def rotate(x: Tensor, position: int) -> Tensor:
            angles = rotary_angles(torch.tensor([[position]]), 16, 10_000.0)
            return apply_rotary(x.to(dtype), *angles).float()

        return (rotate(query, at + 3) * rotate(key, at)).sum()

    torch.testing.assert_close(
        score(0, torch.float32), score(1000, torch.float32), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(
        score(0, torch.bfloat16), score(1001, torch.bfloat16), atol=0.1, rtol=0
    )


def test_grouped_heads_equal_repeated_heads() -> None:
    grouped = make_stack()
    full_config = CONFIG.model_copy(update={"num_kv_heads": CONFIG.num_heads})
    full = TransformerStack(full_config, StackOptions())
    state = grouped.state_dict()
    for name, tensor in state.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            state[name] = tensor.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32)
    full.load_state_dict(state)
    x = torch.randn(2, 9, 32)
    torch.testing.assert_close(grouped(x), full(x))


def test_repeated_heads_attend_like_grouped_ones() -> None:
    query, key, value = (torch.randn(2, heads, 5, 8) for heads in (6, 2, 2))
    attend = torch.nn.functional.scaled_dot_product_attention
    repeated = attend(query, repeat_heads(key, 6), repeat_heads(value, 6))
    torch.testing.assert_close(repeated, attend(query, key, value, enable_gqa=True))


def test_causal_stack_ignores_the_future_and_bidirectional_does_not() -> None:
    x = torch.randn(1, 6, 32)
    changed = x.clone()
    changed[:, -1] += 1.0
    for options, is_equal in ((StackOptions(), True), (ENCODER, False)):
        stack = make_stack(options)
        difference = (stack(x) - stack(changed))[:, :-1].abs().max()
        assert (difference < 1e-6) == is_equal


@pytest.mark.parametrize("norm", ["rms", "layer"])
@pytest.mark.parametrize("mlp", ["swiglu", "gelu"])
def test_padded_batch_equals_single_samples(norm: Any, mlp: Any) -> None:
    options = StackOptions(norm=norm, mlp=mlp, bias=norm == "layer", causal=False, qk_norm=False)
    stack = make_stack(options)
    x = torch.randn(2, 7, 32)
    valid = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    batched = stack(x, mask=padding_mask(valid))
    torch.testing.assert_close(batched[0], stack(x[:1])[0])
    torch.testing.assert_close(batched[1, :4], stack(x[1:, :4])[0])


def test_a_sequence_of_padding_stays_finite() -> None:
    stack = make_stack(ENCODER)
    x = torch.randn(2, 5, 32, requires_grad=True)
    valid = torch.tensor([[True] * 5, [False] * 5])
    stack(x, mask=padding_mask(valid)).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()


def test_positions_restart_with_each_document() -> None:
    ids = torch.tensor([[1, 1, 1, 2, 2, 0, 0], [1, 2, 3, 3, 3, 3, 3]])
    expected = [[0, 1, 2, 0, 1, 0, 1], [0, 0, 0, 1, 2, 3, 4]]
    assert document_positions(ids).tolist() == expected


def test_document_mask_is_block_diagonal_and_causal() -> None:
    mask = document_mask(torch.tensor([[1, 1, 2, 0]]))[0, 0]
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert mask.int().tolist() == expected


def test_valid_positions_skip_padding() -> None:
    valid = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 0]])
    assert valid_positions(valid).tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("prefill", [1, 3, 8])
def test_cached_states_equal_uncached(prefill: int) -> None:
    stack = make_stack()
    x = torch.randn(2, 8, 32)
    cache = stack.new_cache(2, 8)
    with torch.no_grad():
        pieces = [stack(x[:, :prefill], cache=cache)]
        pieces += [stack(x[:, [t]], cache=cache) for t in range(prefill, 8)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), stack(x))


def test_cache_takes_several_tokens_after_the_prefill() -> None:
    stack = make_stack()
    x = torch.randn(1, 9, 32)
    cache = stack.new_cache(1, 9)
    with torch.no_grad():
        pieces = [stack(part, cache=cache) for part in x.split([4, 3, 2], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, dim=1), stack(x))


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_cached_batch_equals_single_samples(side: str) -> None:
    stack = make_stack()
    lengths, steps, width = (2, 5), 3, 5
    rows = [torch.randn(1, length + steps, 32) for length in lengths]
    prompt, valid = torch.randn(2, width, 32), torch.zeros(2, width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(width - length, width)
        prompt[row, place], valid[row, place] = rows[row][0, :length], True
    cache = stack.new_cache(2, width + steps)
    with torch.no_grad():
        first = stack(prompt, cache=cache, valid=valid)
        new = [
            stack(
                torch.cat([r[:, [n + t]] for r, n in zip(rows, lengths, strict=True)]), cache=cache
            )
            for t in range(steps)
        ]
        for row, length in enumerate(lengths):
            expected = stack(rows[row])[0]
            torch.testing.assert_close(first[row][valid[row]], expected[:length])
            torch.testing.assert_close(torch.cat(new, dim=1)[row], expected[length:])


def test_full_cache_is_an_error() -> None:
    stack = make_stack()
    cache = stack.new_cache(1, 2)
    with torch.no_grad(), pytest.raises(ValueError, match="holds 2 positions"):
        stack(torch.randn(1, 3, 32), cache=cache)


def test_dropout_acts_in_training_only() -> None:
    stack = make_stack(StackOptions(dropout=0.5))
    x = torch.randn(1, 5, 32)
    torch.testing.assert_close(stack(x), stack(x))
    expected = stack(x)
    stack.train()
    with pytest.raises(ValueError, match="needs dropout_keys"):
        stack(x)
    keys = [position_keys(torch.tensor([seed]), torch.arange(5)[None]) for seed in (1, 2)]
    first, other = (stack(x, dropout_keys=own) for own in keys)
    assert torch.equal(stack(x, dropout_keys=keys[0]), first)
    assert not torch.equal(first, other) and not torch.equal(first, expected)


@pytest.mark.parametrize("has_mask", [True, False])
def test_kernels_of_accelerators_compute_the_same(has_mask: bool) -> None:
    stack, x = make_stack(), torch.randn(2, 6, 32)
    mask = causal_padding_mask(torch.tensor([[1] * 6, [0, 1, 1, 0, 1, 0]])) if has_mask else None
    results = []
    for inputs in (x, accelerated(x)):
        stack.zero_grad()
        states = stack(inputs, mask=mask)
        assert states.is_cpu == (inputs is x)
        (states**2 * torch.arange(32)).sum().backward()
        results.append([states.detach(), *(grad(weight) for weight in stack.parameters())])
    for on_cpu, on_device in zip(*results, strict=True):
        torch.testing.assert_close(on_device, on_cpu, rtol=1e-4, atol=1e-3, check_device=False)


def test_an_accelerator_converts_the_mask_once_for_all_layers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    masks: list[Tensor] = []

    def attend(query: Tensor, *_: Tensor, attn_mask: Tensor, **__: object) -> Tensor:
        masks.append(attn_mask)
        return query

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    with torch.device("meta"):
        stack = TransformerStack(CONFIG, StackOptions()).bfloat16()
        stack(torch.empty(2, 5, 32).bfloat16(), mask=torch.empty(2, 1, 5, 5, dtype=torch.bool))
    assert len(masks) == CONFIG.num_layers > 1
    assert {mask.dtype for mask in masks} == {torch.bfloat16}
    assert len({mask.untyped_storage()._cdata for mask in masks}) == 1


def test_an_additive_mask_has_aligned_rows_and_the_same_effect() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 4, 5, 8)
    mask = causal_padding_mask(torch.rand(2, 5) < 0.5)
    additive = additive_mask(mask, torch.float32)
    assert additive.shape == mask.shape and additive.stride(2) % 8 == 0
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    found = F.scaled_dot_product_attention(query, key, value, attn_mask=additive)
    torch.testing.assert_close(found, expected)
