"""Text to waveform: Talker codes, codec decoder, vocoder.

A code frame is 40 ms, so T frames give exactly T * 640 samples at 16 kHz.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from muomni.config.models import SPEECH_TEMPERATURE
from muomni.models.speech.codec import Codec
from muomni.models.speech.talker import Talker
from muomni.models.speech.vocoder import mel_to_waveform


@dataclass(frozen=True, slots=True)
class Speech:
    """Generated speech; `stopped` is False if it was truncated at the frame limit."""

    waveform: Tensor  # [num_frames * 640] fp32 at 16 kHz
    mel: Tensor  # [4 * num_frames, num_mels], natural logarithm
    codes: Tensor  # [num_frames, K]
    stopped: bool


@torch.no_grad()
def speak(
    talker: Talker,
    codec: Codec,
    text_ids: Tensor,
    character_ids: Tensor,
    *,
    max_frames: int,
    temperature: float = SPEECH_TEMPERATURE,
    seed: int = 0,
    thinker_hidden: Tensor | None = None,
) -> Speech:
    """Speak a text of `character_ids` [Tl] with the token of each character in `text_ids` [Tl].

    `thinker_hidden` [1, Tl, D] holds the Thinker's state at each character, for a Talker with
    `thinker_hidden_size`. Codes are sampled with `seed`; `temperature=0` is greedy. If the Talker stops
    immediately, the waveform is empty.
    """
    generated = talker.generate(
        text_ids[None],
        character_ids[None],
        max_frames=max_frames,
        temperature=temperature,
        generator=torch.Generator(text_ids.device).manual_seed(seed),
        thinker_hidden=thinker_hidden,
    )
    codes = generated.codes[:, : int(generated.lengths[0])]
    mel = (
        codec.decode(codes)[0] if codes.shape[1] else codes.new_zeros(0, codec.config.mel.num_mels)
    )
    waveform = mel_to_waveform(mel.float(), codec.config.mel)
    return Speech(waveform, mel, codes[0], bool(generated.stopped[0]))
