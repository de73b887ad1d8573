"""Our own speech recognition, to measure whether made speech can be understood.

It is the CTC head of the run's audio encoder, so its errors stand beside those that it makes on the
original audio clips. Words are heard with a list of the training transcripts' words (see
`word_decoder`), characters without.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from muomni.checkpoint.export import read_export
from muomni.config.loading import read_yaml, validate
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
class Heard:
    """What is heard in an audio clip: along the best path, and with the word list where there is one."""

    greedy: str
    words: str


class Recognizer:
    """Transcribes waveforms with an exported audio encoder.

    Without a word decoder, `words` are those of the best path.
    """

    def __init__(
        self, encoder: AudioEncoder, tokenizer: Tokenizer, word_decoder: WordDecoder | None
    ) -> None:
        self.encoder = encoder.eval()
        self.tokenizer = tokenizer
        self.word_decoder = word_decoder

    @torch.no_grad()
    def transcribe(self, waveform: Tensor) -> Heard:
        """What is heard in a waveform [N] at 16 kHz; in nothing, nothing."""
        if len(waveform) == 0:
            return Heard("", "")
        lengths = torch.tensor([len(waveform)], device=waveform.device)
        hidden, frame_lengths = self.encoder(waveform[None], lengths)
        logits = self.encoder.ctc_logits(hidden)
        (ids,) = greedy_decode(logits, frame_lengths)
        greedy = self.tokenizer.decode(ids)
        if self.word_decoder is None:
            return Heard(greedy, greedy)
        (words,) = self.word_decoder.decode(logits, frame_lengths)
        return Heard(greedy, " ".join(words))


def find_recognizer(
    runs: tuple[Path, ...], device: torch.device, transcripts: TrainingTranscripts
) -> Recognizer | None:
    """Load the audio encoder of the first of `runs` that exported one; warns when there is none.

    It may hear the words of `transcripts`. Every rank must call it.
    """
    for run in runs:
        folder = RunFolder(run, _STAGE)
        if folder.export.is_dir():
            export = read_export(folder.export, _STAGE)
            encoder = AudioEncoder(export.config(AudioEncoderConfig))
            export.load_into(encoder)
            tokenizer = Tokenizer.load(export.tokenizer_file)
            units = _trained_units(folder, tokenizer)
            decoder = None if units is None else transcripts.word_decoder(units)
            return Recognizer(encoder.to(device), tokenizer, decoder)
    logger.warning(
        "%s has no export of stage %s, so no WER of made speech",
        " or ".join(map(str, runs)),
        _STAGE,
    )
    return None


def _trained_units(folder: RunFolder, tokenizer: Tokenizer) -> CtcUnits | None:
    """The units that the encoder was trained to hear, which its export does not tell."""
    if not folder.config_file.is_file():
        logger.warning(
            "no word list, so word errors are those of the best path: %s is missing, which tells the "
            "units of the speech encoder",
            folder.config_file,
        )
        return None
    options = read_yaml(folder.config_file).get("options", {})
    where = f"{folder.config_file}, section 'options'"
    return CtcUnits(tokenizer, validate(AudioEncoderOptions, options, where).num_merges)
