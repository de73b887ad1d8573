"""Activation checkpointing runs blocks twice and keeps gradients, with dropout too."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from muomni.config.models import AudioEncoderConfig, CodecConfig, ThinkerConfig
from muomni.errors import ConfigError
from muomni.models.language.thinker import Thinker
from muomni.models.layers.blocks import recompute_activations
from muomni.models.layers.flops import module_flops
from muomni.models.layers.transformer import TransformerBlock
from muomni.models.speech.audio_encoder import AudioEncoder
from muomni.models.speech.codec import Codec, ResidualConv
from tests.conversations import SIZES

WAVEFORM = torch.sin(torch.arange(2 * 6400.0)).view(2, 6400)
LENGTHS = torch.tensor([6400, 4000])


def thinker() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    model = Thinker(ThinkerConfig(**SIZES["thinker"], vocab_size=40))
    ids = torch.arange(12).view(2, 6)
    return model, lambda module: module(ids).square().sum()


def audio_encoder(dropout: float) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    sizes = {**SIZES["audio_encoder"], "dropout": dropout, "vocab_size": 40}
    model = AudioEncoder(AudioEncoderConfig(**sizes))
    return model, lambda module: module(WAVEFORM, LENGTHS, LENGTHS)[0].square().sum()


def codec() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    model = Codec(CodecConfig(**SIZES["codec"]))
    return model, lambda module: module(WAVEFORM, LENGTHS, LENGTHS).mel.square().sum()


def run_step(
    build: Callable[[], tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]], policy: Any
) -> tuple[list[int], torch.Tensor, dict[str, torch.Tensor]]:
    """Calls of each block in a step under `policy`, the loss, and the gradients."""
    torch.manual_seed(0)
    model, loss = build()
    recompute_activations(model, policy)
    blocks = [m for m in model.modules() if isinstance(m, (TransformerBlock, ResidualConv))]
    calls = [0] * len(blocks)

    def count(number: int, *_: object) -> None:
        calls[number] += 1

    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(partial(count, number))
    total = loss(model.train())
    total.backward()
    return (
        calls,
        total.detach(),
        {n: p.grad for n, p in model.named_parameters() if p.grad is not None},
    )


BUILDERS = [thinker, partial(audio_encoder, 0.0), partial(audio_encoder, 0.3), codec]


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("policy", ["full", True, 1, 2, 3])
def test_recomputation_keeps_loss_and_gradients(
    build: Callable[[], tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]], policy: Any
) -> None:
    calls, loss, gradients = run_step(build, "none")
    assert set(calls) == {1}
    again, same_loss, same_gradients = run_step(build, policy)
    interval = policy if type(policy) is int else 1
    assert set(again) == ({1, 2} if interval > 1 else {2})
    torch.testing.assert_close(same_loss, loss, atol=0, rtol=0)
    torch.testing.assert_close(same_gradients, gradients)


def test_an_interval_starts_at_the_first_block() -> None:
    sizes = {**SIZES["thinker"], "num_layers": 5}

    def deep() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
        model = Thinker(ThinkerConfig(**sizes, vocab_size=40))
        return model, lambda module: module(torch.arange(6)[None]).square().sum()

    assert run_step(deep, 2)[0] == [2, 1, 2, 1, 2]
    assert run_step(deep, 7)[0] == [2, 1, 1, 1, 1]
    assert run_step(deep, False)[0] == [1] * 5


def test_parts_have_their_own_policies() -> None:
    num_blocks = SIZES["codec"]["num_blocks"]
    assert run_step(codec, {"decoder": "full"})[0] == [1] * num_blocks + [2] * (num_blocks + 2)
    assert run_step(codec, {"enc*": "full", "*": "none"})[0] == [2] * num_blocks + [1] * (
        num_blocks + 2
    )
    model, _ = codec()
    recompute_activations(model, {"decoder": "full"})
    assert isinstance(model, Codec)
    block = module_flops(model.decoder.blocks[0]).forward
    # All blocks, the last two at twice and four times the rate of the others.
    assert model.decoder.flops().recomputed == (num_blocks + 6) * block
    assert model.encoder.flops().recomputed == 0
    recompute_activations(model, {})
    assert model.decoder.flops().recomputed == 0


def test_a_pattern_without_a_match_is_rejected() -> None:
    model, _ = codec()
    with pytest.raises(ConfigError, match=r"no part matches 'decodr'.*'decoder'.*decoder, encoder"):
        recompute_activations(model, {"decodr": "full"})
