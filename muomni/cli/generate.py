"""`muomni generate`: answer a question of text, images, and audio with the export of stage sft."""

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from muomni.command_line import MAX_SEED, integer, number, path, temperature

if TYPE_CHECKING:
    from muomni.chat.session import ChatOptions

SUMMARY = """\
Answer a question of text, images, and audio.

Prints the answer and, with --speak, also writes it to a WAV file as speech. The last line of standard output is
one JSON object."""
EXAMPLES = (
    "muomni generate --run runs/first --text 'What is this?' --image cat.png",
    "muomni generate --run runs/first --audio question.flac --speak answer.wav",
)
SAMPLE_RUN = Path("runs/quickstart")
_SPEECH_TEMPERATURE = 0.7  # muomni.config.models.SPEECH_TEMPERATURE, which a test compares


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the question, the answer's limits, and sampling."""
    add_answer_options(parser)
    parser.add_argument(
        "--text", help="question; each <image> and <audio> is replaced by the next file of its kind"
    )
    parser.add_argument("--image", type=path, nargs="+", default=[], help="image files")
    parser.add_argument("--audio", type=path, nargs="+", default=[], help="audio files")
    parser.add_argument(
        "--speak", type=path, metavar="OUT.wav", help="also write the answer as speech"
    )
    parser.add_argument(
        "--min-new-tokens", type=integer(), default=0, help="minimum length in tokens (default: 0)"
    )
    parser.add_argument(
        "--keep-loops", action="store_true", help="do not truncate repetitive answers"
    )
    parser.add_argument("--json", type=path, metavar="FILE", help="also write the JSON to a file")


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """Add the run, the limits of answers, and sampling, which `chat` and `demo` share."""
    parser.add_argument(
        "--run", type=path, default=SAMPLE_RUN,
        help=f"run folder with an sft export (default: {SAMPLE_RUN})",
    )  # fmt: skip
    parser.add_argument("--system", help="system prompt")
    parser.add_argument(
        "--max-new-tokens", type=integer(1, 2**20), default=128,
        help="maximum length in tokens (default: 128)",
    )  # fmt: skip
    parser.add_argument(
        "--max-seconds", type=number(at_most=600, above=0), default=30.0,
        help="maximum length of the speech (default: 30)",
    )  # fmt: skip
    parser.add_argument(
        "--temperature", type=temperature, default=0.0,
        help="sampling temperature; 0 = greedy (default: 0)",
    )  # fmt: skip
    parser.add_argument(
        "--speech-temperature", type=temperature, default=_SPEECH_TEMPERATURE,
        help="sampling temperature of the speech codes; 0 = greedy, which tends to loop "
        f"(default: {_SPEECH_TEMPERATURE})",
    )  # fmt: skip
    parser.add_argument(
        "--seed", type=integer(0, MAX_SEED), default=0, help="sampling seed (default: 0)"
    )
    parser.add_argument(
        "--no-tf32",
        action="store_true",
        help="on GPUs, multiply in full fp32 instead of TF32 (slower)",
    )


def add_chat_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of conversations: `add_answer_options`, and the history."""
    add_answer_options(parser)
    parser.add_argument(
        "--single-turn",
        action="store_true",
        help="answer each question without the earlier turns, for models trained on single turns",
    )


def chat_options(arguments: argparse.Namespace) -> "ChatOptions":
    """The values of `add_chat_options`."""
    from muomni.chat.session import ChatOptions

    return ChatOptions(
        system=arguments.system,
        single_turn=arguments.single_turn,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
        speech_temperature=arguments.speech_temperature,
        max_seconds=arguments.max_seconds,
        seed=arguments.seed,
    )


def run(arguments: argparse.Namespace) -> None:
    """Generate and print the answer; raises MuomniError."""
    from muomni.inference.generate import GenerationRequest, generate
    from muomni.io.atomic_write import write_atomic

    request = GenerationRequest(
        run=arguments.run,
        text=arguments.text,
        images=tuple(arguments.image),
        audios=tuple(arguments.audio),
        system=arguments.system,
        speech_file=arguments.speak,
        json_file=arguments.json,
        max_new_tokens=arguments.max_new_tokens,
        min_new_tokens=arguments.min_new_tokens,
        cut_loops=not arguments.keep_loops,
        max_seconds=arguments.max_seconds,
        temperature=arguments.temperature,
        speech_temperature=arguments.speech_temperature,
        seed=arguments.seed,
        tf32=not arguments.no_tf32,
    )
    result = generate(request)
    text = json.dumps(result, ensure_ascii=False)
    if request.json_file is not None:
        write_atomic(request.json_file, f"{text}\n".encode())
    print(result["text"])
    print(text, flush=True)
