"""Compiled blocks keep their names and results, and compile few times."""

from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

from muomni.config.models import CodecConfig, TransformerConfig
from muomni.models.layers.attention import StackOptions
from muomni.models.layers.blocks import compile_blocks, not_compiled, recompute_activations
from muomni.models.layers.masks import document_mask, document_positions
from muomni.models.layers.transformer import TransformerStack
from muomni.models.speech.codec import Codec

SIZES = TransformerConfig(
    hidden_size=32, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=64
)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_stack() -> TransformerStack:
    torch.manual_seed(0)
    return TransformerStack(SIZES, StackOptions(causal=True, rope_theta=1e4))


def num_compilations() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_packed_sequences_of_many_lengths_compile_twice(
    is_recomputed: bool,
) -> None:
    plain, compiled = make_stack(), make_stack()
    names = list(compiled.state_dict())
    assert compile_blocks(compiled, backend="aot_eager") == 3
    assert list(compiled.state_dict()) == names
    if is_recomputed:
        recompute_activations(compiled)
    for length in (16, 24, 40, 17, 9, 33, 64, 50, 21, 28, 12):
        documents = torch.ones(2, length, dtype=torch.long).cumsum(1) // 6 + 1
        x = torch.randn(2, length, 32, requires_grad=True)  # as embeddings do
        given = {"positions": document_positions(documents), "mask": document_mask(documents)}
        for stack in (plain, compiled):
            stack.zero_grad()
            stack(x, **given).square().sum().backward()
        torch.testing.assert_close(compiled(x, **given), plain(x, **given))
        for ours, theirs in zip(compiled.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5)
    # One for the first length, one for all others.
    assert num_compilations() == 2


def test_both_halves_of_a_codec_compile() -> None:
    config = CodecConfig(hidden_size=24, latent_size=8, codebook_size=8, num_blocks=2)
    assert compile_blocks(Codec(config)) == 2 + 2 + 2


def test_not_compiled_runs_eagerly() -> None:
    stack = make_stack()
    compile_blocks(stack, backend="aot_eager")
    with not_compiled():
        stack(torch.randn(1, 8, 32, requires_grad=True))
    assert num_compilations() == 0
    stack(torch.randn(1, 8, 32, requires_grad=True))
    assert num_compilations() == 1
