"""Voices of the sample corpora: flite, festival, espeak-ng, and words by Allison Smith.

A voice speaks texts as mono float32 waveforms at 16 kHz, without silence at either end.
"""

import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from muomni.data.media.resampling import resample

RATE_HZ = 16_000
_PEAK = 0.7
# Frames of 10 ms below this share of the loudest one are silent.
_SILENCE, _FRAME = 0.02, RATE_HZ // 100
_KEPT_SILENCE_S, _PAUSE_S = 0.05, 0.08
_SECONDS_PER_CALL = 600


@dataclass(frozen=True, slots=True)
class Voice:
    """A voice: its name, the engine that speaks, and the engine's name of it."""

    name: str
    engine: str
    voice: str


TALKER = Voice("flite-slt", "flite", "slt")
TRAINED = (
    TALKER,
    Voice("flite-awb", "flite", "awb"),
    Voice("festival-ked", "festival", "ked_diphone"),
    Voice("festival-slt", "festival", "cmu_us_slt_arctic_hts"),
    Voice("espeak-us-m3", "espeak-ng", "en-us+m3"),
    Voice("espeak-gb-f2", "espeak-ng", "en-gb+f2"),
    Voice("espeak-scotland-m7", "espeak-ng", "en-gb-scotland+m7"),
)
ALLISON = "allison"
VALIDATION = (Voice("flite-kal", "flite", "kal16"),)
# Other people than those of the trained voices, and another accent and sex of espeak-ng's.
UNSEEN = (Voice("flite-rms", "flite", "rms"), Voice("espeak-rp-f5", "espeak-ng", "en-gb-x-rp+f5"))


def speak(voice: Voice, texts: Sequence[str]) -> list[np.ndarray]:
    """Speak texts; raises `subprocess.CalledProcessError` if the engine fails."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.wav" for number in range(len(texts))]
        _ENGINES[voice.engine](voice.voice, texts, paths)
        return [trim(read(path)) for path in paths]


def read(path: Path) -> np.ndarray:
    """An audio file as mono waveform at 16 kHz."""
    samples, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    mono = samples.mean(axis=1)
    return mono if rate_hz == RATE_HZ else resample(mono[:, None], rate_hz, RATE_HZ)[:, 0]


def trim(waveform: np.ndarray) -> np.ndarray:
    """Cut the silence at both ends to a twentieth of a second, and scale the peak."""
    frames = np.abs(waveform[: len(waveform) // _FRAME * _FRAME]).reshape(-1, _FRAME).max(axis=1)
    loud = np.flatnonzero(frames > _SILENCE * frames.max())
    kept = round(_KEPT_SILENCE_S * RATE_HZ)
    start = max(0, loud[0] * _FRAME - kept)
    cut = waveform[start : (loud[-1] + 1) * _FRAME + kept]
    return cut * (_PEAK / np.abs(cut).max())


def join(words: Sequence[np.ndarray]) -> np.ndarray:
    """Recorded words with a pause after each one, as telephone systems read out numbers."""
    pause = np.zeros(round(_PAUSE_S * RATE_HZ), np.float32)
    return trim(np.concatenate([part for word in words for part in (trim(word), pause)]))


def encode(waveform: np.ndarray, path: Path) -> None:
    """Write an Opus file of 12 kbit/s."""
    options = (
        "--quiet --bitrate 12 --speech --framesize 60 --discard-comments --padding 0 --serial 1"
    )
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        soundfile.write(wav.name, waveform, RATE_HZ, subtype="PCM_16")
        subprocess.run(["opusenc", *options.split(), wav.name, str(path)], check=True)


def _flite(voice: str, texts: Sequence[str], paths: Sequence[Path]) -> None:
    for text, path in zip(texts, paths, strict=True):
        subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(path)], check=True)


def _espeak(voice: str, texts: Sequence[str], paths: Sequence[Path]) -> None:
    for text, path in zip(texts, paths, strict=True):
        subprocess.run(["espeak-ng", "-v", voice, "-s", "165", "-w", str(path), text], check=True)


def _festival(voice: str, texts: Sequence[str], paths: Sequence[Path]) -> None:
    """One process for all texts, since it takes a second to start."""
    lines = [f"(voice_{voice})"]
    for text, path in zip(texts, paths, strict=True):
        lines.append(f'(utt.save.wave (utt.synth (Utterance Text "{text}")) "{path}" \'riff)')
    with tempfile.NamedTemporaryFile("w", suffix=".scm") as script:
        script.write("\n".join(lines))
        script.flush()
        subprocess.run(["festival", "--batch", script.name], check=True, timeout=_SECONDS_PER_CALL)


_ENGINES: dict[str, Callable[[str, Sequence[str], Sequence[Path]], None]] = {
    "flite": _flite,
    "espeak-ng": _espeak,
    "festival": _festival,
}
