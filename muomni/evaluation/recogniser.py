"""Our own speech recognition, to measure whether made speech can be understood.

It is the CTC head of the run's audio encoder, so its errors stand beside those that it makes on the
original recordings.
"""

import logging
from pathlib import Path

import torch
from torch import Tensor

from muomni.checkpoint.export import read_export
from muomni.config.models import AudioEncoderConfig
from muomni.data.tokenizer import Tokenizer
from muomni.models.audio_encoder import AudioEncoder
from muomni.models.ctc import greedy_decode
from muomni.run_folder import RunFolder

logger = logging.getLogger(__name__)
_STAGE = "audio_encoder"


class Recogniser:
    """Transcribes waveforms with an exported audio encoder."""

    def __init__(self, encoder: AudioEncoder, tokenizer: Tokenizer) -> None:
        self.encoder = encoder.eval()
        self.tokenizer = tokenizer

    @torch.no_grad()
    def transcribe(self, waveform: Tensor) -> str:
        """The words heard in a waveform [N] at 16 kHz; of nothing, nothing."""
        if len(waveform) == 0:
            return ""
        lengths = torch.tensor([len(waveform)], device=waveform.device)
        hidden, frame_lengths = self.encoder(waveform[None], lengths)
        (ids,) = greedy_decode(self.encoder.ctc_logits(hidden), frame_lengths)
        return self.tokenizer.decode(ids)


def find_recogniser(runs: tuple[Path, ...], device: torch.device) -> Recogniser | None:
    """Load the audio encoder of the first of `runs` that exported one; warns when there is none."""
    for run in runs:
        folder = RunFolder(run, _STAGE).export
        if folder.is_dir():
            export = read_export(folder, _STAGE)
            encoder = AudioEncoder(export.config(AudioEncoderConfig))
            export.load_into(encoder)
            return Recogniser(encoder.to(device), Tokenizer.load(export.tokenizer_file))
    logger.warning(
        "%s has no export of stage %s, so no WER of made speech",
        " or ".join(map(str, runs)),
        _STAGE,
    )
    return None
