"""Recomputed activations: every block runs twice, gradients are the same, also those behind dropout."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from muomni.config.models import AudioEncoderConfig, CodecConfig, ThinkerConfig
from muomni.models.audio_encoder import AudioEncoder
from muomni.models.codec import Codec, ResidualConv
from muomni.models.layers import TransformerBlock
from muomni.models.recompute import recompute_activations
from muomni.models.thinker import Thinker
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
    return model, lambda module: module(WAVEFORM, LENGTHS)[0].square().sum()


def codec() -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    model = Codec(CodecConfig(**SIZES["codec"]))
    return model, lambda module: module(WAVEFORM, LENGTHS, LENGTHS).mel.square().sum()


@pytest.mark.parametrize(
    "build", [thinker, partial(audio_encoder, 0.0), partial(audio_encoder, 0.3), codec]
)
def test_blocks_run_again_and_gradients_are_the_same(
    build: Callable[[], tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]],
) -> None:
    gradients, num_calls = [], []
    for is_checkpointing in (False, True):
        torch.manual_seed(0)
        model, loss = build()
        if is_checkpointing:
            recompute_activations(model)
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        blocks = [m for m in model.modules() if isinstance(m, (TransformerBlock, ResidualConv))]
        for block in blocks:
            block.register_forward_pre_hook(count)
        loss(model.train()).backward()
        num_calls.append(calls / len(blocks))
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert num_calls == [1, 2]
    torch.testing.assert_close(*gradients)
