"""A torchaudio Conformer trained with CTC on random padded batches, for `perception_speed.py`."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchaudio.models import Conformer
from torchaudio.transforms import MelSpectrogram

from muomni.config.models import MEL_RATE_HZ, SAMPLE_RATE_HZ, AudioEncoderConfig


class ConformerCtc(nn.Module):
    """Log-mel, two strided convolutions, Conformer, and CTC head, as in muomni's encoder.

    A block has two feed-forward layers of two matrices each, with as many parameters as muomni's single
    layer of three matrices.
    """

    def __init__(self, config: AudioEncoderConfig) -> None:
        super().__init__()
        channels, mel = config.conv_channels, config.mel
        self.mel = MelSpectrogram(
            SAMPLE_RATE_HZ, mel.num_fft, hop_length=mel.hop, n_mels=mel.num_mels
        )
        self.subsampling = nn.Sequential(
            nn.Conv2d(1, channels, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.GELU(),
        )
        self.project = nn.Linear(channels * mel.num_mels // 4, config.hidden_size)
        self.conformer = Conformer(
            config.hidden_size,
            config.num_heads,
            3 * config.intermediate_size // 4,
            config.num_layers,
            config.conv_kernel_size,
            dropout=config.dropout,
        )
        self.head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms [B, N] and lengths [B] -> log-probabilities [B, T, V] and frame lengths [B]."""
        features = self.mel(waveform).clamp(min=1e-5).log().transpose(1, 2)
        x = self.subsampling(features[:, None])
        x = self.project(x.transpose(1, 2).flatten(2))
        num_frames = (lengths // self.mel.hop_length // 4 + 1).clamp(max=x.shape[1])
        # The Conformer builds its mask from the longest length.
        x, num_frames = self.conformer(x[:, : int(num_frames.max())], num_frames)
        return self.head(x).log_softmax(-1), num_frames


def random_batches(session: Any, num_batches: int) -> list[dict[str, Tensor]]:
    """Batches with a fixed number of audio clips that match the stage's budget on average when padded."""
    view, source = session.stage.view(), session.planned.source
    read, random = view.reader(source), np.random.default_rng(0)
    seconds = view.lengths(source)[np.arange(len(source))] / MEL_RATE_HZ
    budget_s = session.request.config.batch.micro_seconds
    num_rows = next(
        n for n in range(1, len(source)) if (n + 1) * _mean_longest(seconds, n + 1) > budget_s
    )
    rows = [random.integers(len(source), size=num_rows) for _ in range(num_batches)]
    return [view.collate([[read(int(index), None) for index in row]]) for row in rows]


def _mean_longest(seconds: np.ndarray, num_rows: int) -> float:
    sampled = np.random.default_rng(1).choice(seconds, size=(200, num_rows))
    return float(sampled.max(axis=1).mean())


def conformer_loop(
    session: Any, batches: list[dict[str, Tensor]]
) -> tuple[Callable[[], None], int]:
    """Return a function that trains one step per batch in plain torch, and the number of parameters."""
    sizes, optim = session.stage.model_config(), session.request.config.optim
    model = ConformerCtc(sizes)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=optim.lr, betas=optim.betas, weight_decay=optim.weight_decay,
        fused=True,
    )  # fmt: skip

    def run() -> None:
        for batch in batches:
            scores, num_frames = model(batch["waveform"], batch["lengths"])
            loss = F.ctc_loss(
                scores.transpose(0, 1), batch["labels"], num_frames, batch["label_lengths"],
                zero_infinity=True,
            )  # fmt: skip
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run, sum(p.numel() for p in model.parameters())
