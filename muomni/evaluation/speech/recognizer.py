"""Speech recognition to measure the intelligibility of generated speech.

Uses the CTC head of the run's audio encoder, so the error rates of generated speech are comparable with
those on the original audio. Words are decoded with the word list of the training transcripts (see
`word_decoder`), characters greedily.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from muomni.checkpoint.export import Export, read_export
from muomni.config.models import AudioEncoderConfig
from muomni.config.stages import AudioEncoderOptions
from muomni.data.text.ctc_units import CtcUnits
from muomni.data.text.tokenizer import Tokenizer
from muomni.evaluation.speech.training_transcripts import TrainingTranscripts
from muomni.models.speech.audio_encoder import AudioEncoder
from muomni.models.speech.ctc import greedy_decode
from muomni.models.speech.word_decoder import WordDecoder
from muomni.run_folder import RunFolder

logger = logging.getLogger(__name__)
_STAGE = "audio_encoder"


@dataclass(frozen=True, slots=True)
class Transcription:
    """The transcript of an audio clip by greedy CTC decoding, and by decoding with the word list."""

    greedy: str
    words: str


class Recognizer:
    """Transcribes waveforms with an exported audio encoder.

    Without a word decoder, `words` is the greedy transcript.
    """

    def __init__(
        self,
        export: Export,
        encoder: AudioEncoder,
        tokenizer: Tokenizer,
        word_decoder: WordDecoder | None,
    ) -> None:
        self.export = export
        self.encoder = encoder.eval()
        self.tokenizer = tokenizer
        self.word_decoder = word_decoder

    @torch.no_grad()
    def transcribe(self, waveform: Tensor) -> Transcription:
        """Transcribe a waveform [N] at 16 kHz; an empty one has an empty transcript."""
        if len(waveform) == 0:
            return Transcription("", "")
        lengths = torch.tensor([len(waveform)], device=waveform.device)
        hidden, frame_lengths = self.encoder(waveform[None], lengths)
        logits = self.encoder.ctc_logits(hidden)
        (ids,) = greedy_decode(logits, frame_lengths)
        greedy = self.tokenizer.decode(ids)
        if self.word_decoder is None:
            return Transcription(greedy, greedy)
        (words,) = self.word_decoder.decode(logits, frame_lengths)
        return Transcription(greedy, " ".join(words))


def find_recognizer(
    runs: tuple[Path, ...], device: torch.device, transcripts: TrainingTranscripts
) -> Recognizer | None:
    """Load the audio encoder of the first run that exported one; without any, warn and return None.

    The words of `transcripts` form its word list. A collective.
    """
    for run in runs:
        folder = RunFolder(run, _STAGE)
        if folder.export.is_dir():
            export = read_export(folder.export, _STAGE)
            encoder = AudioEncoder(export.config(AudioEncoderConfig))
            export.load_into(encoder)
            tokenizer = Tokenizer.load(export.tokenizer_file)
            options = export.run_config.options
            assert isinstance(options, AudioEncoderOptions)
            decoder = transcripts.word_decoder(CtcUnits(tokenizer, options.num_merges))
            return Recognizer(export, encoder.to(device), tokenizer, decoder)
    logger.warning(
        "skipping WER of generated speech: no export of stage %s in %s",
        _STAGE,
        " or ".join(map(str, runs)),
    )
    return None
