"""Answer a question of text, images, and audio: `python launch/generate.py --run DIR --text ...`.

Prints the answer and, with --speak, writes it to a WAV file as speech. The last line of stdout is one
JSON object.
"""

import argparse
import json
import logging
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from muomni.config.models import SPEECH_TEMPERATURE
from muomni.errors import exit_on_error
from muomni.inference.generate import GenerationRequest, generate
from muomni.io.atomic_write import write_atomic

SAMPLE_RUN = Path("runs/quickstart")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = argparse.ArgumentParser(
        prog="generate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    flags.add_argument(
        "--run", type=Path, default=SAMPLE_RUN,
        help=f"run folder with an sft export (default: {SAMPLE_RUN})",
    )  # fmt: skip
    flags.add_argument(
        "--text", help="question; each <image> and <audio> is replaced by the next file of its kind"
    )
    flags.add_argument("--image", type=Path, nargs="+", default=[], help="image files")
    flags.add_argument("--audio", type=Path, nargs="+", default=[], help="audio files")
    flags.add_argument("--system", help="system prompt")
    flags.add_argument(
        "--speak", type=Path, metavar="OUT.wav", help="also write the answer as speech"
    )
    flags.add_argument(
        "--max-new-tokens", type=int, default=128, help="maximum length in tokens (default: 128)"
    )
    flags.add_argument(
        "--min-new-tokens", type=int, default=0, help="minimum length in tokens (default: 0)"
    )
    flags.add_argument(
        "--keep-loops", action="store_true", help="do not truncate repetitive answers"
    )
    flags.add_argument(
        "--max-seconds", type=float, default=30.0, help="maximum length of the speech (default: 30)"
    )
    flags.add_argument(
        "--temperature", type=float, default=0.0,
        help="sampling temperature; 0 = greedy (default: 0)",
    )  # fmt: skip
    flags.add_argument(
        "--speech-temperature", type=float, default=SPEECH_TEMPERATURE,
        help="sampling temperature of the speech codes; 0 = greedy, which tends to loop "
        f"(default: {SPEECH_TEMPERATURE})",
    )  # fmt: skip
    flags.add_argument("--seed", type=int, default=0, help="sampling seed (default: 0)")
    flags.add_argument("--json", type=Path, metavar="FILE", help="also write the JSON to a file")
    return flags


def main() -> None:
    arguments = parser().parse_args()
    with exit_on_error("generate"):
        logging.basicConfig(level=logging.WARNING, format="%(message)s")
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
        )
        result = generate(request)
        text = json.dumps(result, ensure_ascii=False)
        if request.json_file is not None:
            write_atomic(request.json_file, f"{text}\n".encode())
        print(result["text"])
        print(text, flush=True)


if __name__ == "__main__":
    main()
