"""Answer one question in text and, if requested, speech.

Requests are checked before torch is imported.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muomni.config.models import SAMPLE_RATE_HZ, SPEECH_TEMPERATURE
from muomni.errors import ConfigError


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A question to the sft export of a run, and how to answer it.

    `speech_file` and `json_file` are outputs. A temperature of 0 is greedy decoding. `tf32` as in
    `open_assistant`. Raises ConfigError for an output that cannot be written.
    """

    run: Path
    text: str | None = None
    images: tuple[Path, ...] = ()
    audios: tuple[Path, ...] = ()
    system: str | None = None
    speech_file: Path | None = None
    json_file: Path | None = None
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    cut_loops: bool = True
    max_seconds: float = 30.0
    temperature: float = 0.0
    speech_temperature: float = SPEECH_TEMPERATURE
    seed: int = 0
    tf32: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ConfigError(
                f"--min-new-tokens must be between 0 and --max-new-tokens ({self.max_new_tokens}), "
                f"got {self.min_new_tokens}"
            )
        for path in filter(None, (self.speech_file, self.json_file)):
            folder = path.parent
            if not folder.is_dir() or not os.access(folder, os.W_OK):
                raise ConfigError(
                    f"cannot write {path}: {folder} is not a writable folder; create it first"
                )
        if self.speech_file is not None and self.speech_file.suffix.lower() != ".wav":
            raise ConfigError(f"--speak must end in .wav, got {self.speech_file}")


def generate(request: GenerationRequest) -> dict[str, Any]:
    """Answer a question and write the speech file; returns a JSON object.

    Raises MuomniError if the export or a file is missing or invalid.
    """
    import torch

    from muomni.inference.answer import answer, read_question
    from muomni.inference.load import open_assistant
    from muomni.inference.speech import check_can_speak, speak_answer, write_speech

    question = read_question(request.text, request.images, request.audios, system=request.system)
    assistant = open_assistant(request.run, request.tf32)
    if request.speech_file is not None:
        check_can_speak(assistant)
    generated = answer(
        assistant,
        question,
        max_new_tokens=request.max_new_tokens,
        min_new_tokens=request.min_new_tokens,
        cut_loops=request.cut_loops,
        temperature=request.temperature,
        generator=torch.Generator(assistant.device).manual_seed(request.seed),
    )
    result: dict[str, Any] = {
        "text": generated.text,
        "num_tokens": len(generated.ids),
        "stopped": generated.stopped,
    }
    if request.speech_file is not None:
        speech = speak_answer(
            assistant,
            generated,
            max_seconds=request.max_seconds,
            temperature=request.speech_temperature,
            seed=request.seed,
        )
        write_speech(request.speech_file, speech)
        result |= {
            "speech": str(request.speech_file),
            "speech_s": len(speech.waveform) / SAMPLE_RATE_HZ,
            "speech_stopped": speech.stopped,
        }
    return result
