"""Answer a question of text, images and audio clips: `python launch/generate.py --run DIR --text ...`.

The answer is printed as text, and spoken into a WAV file with --speak. The last line of standard output
is one JSON object with the same, for scripts.
"""

import argparse
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muomni.config.models import SPEECH_TEMPERATURE
from muomni.errors import ConfigError, exit_on_error

SAMPLE_RUN = Path("runs/quickstart")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        prog="generate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument(
        "--run", type=Path, default=SAMPLE_RUN, help=f"run folder with an sft export ({SAMPLE_RUN})"
    )
    flags.add_argument(
        "--text", help="what is asked; <image> and <audio> in it stand for the next of the files"
    )
    flags.add_argument("--image", type=Path, nargs="+", default=[], help="image files")
    flags.add_argument("--audio", type=Path, nargs="+", default=[], help="audio clips")
    flags.add_argument("--system", help="an instruction before the question")
    flags.add_argument("--speak", type=Path, metavar="OUT.wav", help="speak the answer into a file")
    flags.add_argument("--max-new-tokens", type=int, default=128, help="length limit (128)")
    flags.add_argument(
        "--min-new-tokens", type=int, default=0, help="the answer may not end before (0)"
    )
    flags.add_argument(
        "--keep-loops", action="store_true", help="do not cut an answer that repeats itself"
    )
    flags.add_argument("--max-seconds", type=float, default=30.0, help="limit of the speech (30)")
    flags.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest; above, it draws (0)"
    )
    flags.add_argument(
        "--speech-temperature", type=float, default=SPEECH_TEMPERATURE,
        help=f"of the speech codes; 0 takes the likeliest, which tend to loop ({SPEECH_TEMPERATURE})",
    )  # fmt: skip
    flags.add_argument("--seed", type=int, default=0, help="of the draws (0)")
    flags.add_argument("--json", type=Path, metavar="FILE", help="write the result there, too")
    return flags


def main() -> None:
    arguments = parser().parse_args()
    with exit_on_error("generate"):
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
        _check(arguments)
        result = generate(arguments)
        text = json.dumps(result, ensure_ascii=False)
        if arguments.json is not None:
            _write_json(arguments.json, text)
        print(result["text"])
        print(text, flush=True)


def generate(arguments: argparse.Namespace) -> dict[str, Any]:
    """Read the question, load the model, answer and speak; raises MuomniError."""
    from muomni.inference.answer import answer, read_question

    question = read_question(
        arguments.text, arguments.image, arguments.audio, system=arguments.system
    )
    import torch

    from muomni.inference.load import load_assistant
    from muomni.inference.speech import check_can_speak, speak_answer, write_speech
    from muomni.training.engine.precision import pick_device

    assistant = load_assistant(arguments.run, pick_device(0))
    if arguments.speak is not None:
        check_can_speak(assistant)
    generator = torch.Generator(assistant.device).manual_seed(arguments.seed)
    made = answer(
        assistant,
        question,
        max_new_tokens=arguments.max_new_tokens,
        min_new_tokens=arguments.min_new_tokens,
        cut_loops=not arguments.keep_loops,
        temperature=arguments.temperature,
        generator=generator,
    )
    result: dict[str, Any] = {
        "text": made.text, "num_tokens": len(made.ids), "stopped": made.stopped,
    }  # fmt: skip
    if arguments.speak is not None:
        speech = speak_answer(
            assistant,
            made,
            max_seconds=arguments.max_seconds,
            temperature=arguments.speech_temperature,
            seed=arguments.seed,
        )
        write_speech(arguments.speak, speech)
        result |= {
            "speech": str(arguments.speak),
            "speech_s": len(speech.waveform) / 16_000,
            "speech_stopped": speech.stopped,
        }
    return result


def _check(arguments: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "max_seconds"):
        if getattr(arguments, name) <= 0:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be above 0, not {getattr(arguments, name)}")
    if not 0 <= arguments.min_new_tokens <= arguments.max_new_tokens:
        raise ConfigError(
            f"--min-new-tokens {arguments.min_new_tokens} must be from 0 to --max-new-tokens "
            f"{arguments.max_new_tokens}"
        )
    for name in ("temperature", "speech_temperature"):
        if getattr(arguments, name) < 0:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be at least 0, not {getattr(arguments, name)}")
    for path in filter(None, (arguments.speak, arguments.json)):
        folder = path.parent
        if not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ConfigError(
                f"cannot write {path}: {folder} is no folder to write to; make it first"
            )
    if arguments.speak is not None and arguments.speak.suffix.lower() != ".wav":
        raise ConfigError(f"--speak {arguments.speak} must end in .wav")


def _write_json(path: Path, text: str) -> None:
    from muomni.io.atomic_write import write_atomic

    write_atomic(path, f"{text}\n".encode())


if __name__ == "__main__":
    main()
