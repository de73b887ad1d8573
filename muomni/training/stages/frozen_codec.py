"""The frozen codec of an earlier stage, which encodes audio clips into the Talker's target codes.

It stays outside the DeepSpeed module: it is not trained, and its codebooks must not be cast.
"""

import torch

from muomni.checkpoint.export import Export
from muomni.config.models import CodecConfig
from muomni.models.speech.codec import Codec
from muomni.models.speech.mel import length_mask


class FrozenCodec:
    """Loads the codec of an export on first use."""

    def __init__(self, export: Export, device: torch.device) -> None:
        self.config = export.config(CodecConfig)
        self._export = export
        self._device = device
        self._codec: Codec | None = None

    @property
    def codec(self) -> Codec:
        """The loaded codec, fp32, in evaluation mode."""
        if self._codec is None:
            codec = Codec(self.config)
            self._export.load_into(codec)
            self.replace(codec)
        assert self._codec is not None
        return self._codec

    def replace(self, codec: Codec) -> None:
        """Use another codec, such as the one in the export of a later stage."""
        self._codec = codec.to(self._device).eval().requires_grad_(False)

    @torch.no_grad()
    def encode(self, waveform: torch.Tensor, lengths: torch.Tensor) -> dict[str, torch.Tensor]:
        """Encode audio clips [B, N] of `lengths` [B] to `codes` [B, Tf, K] and `code_mask` [B, Tf]."""
        codes, code_lengths = self.codec.encode(waveform, lengths)
        return {"codes": codes, "code_mask": length_mask(code_lengths, codes.shape[1])}
