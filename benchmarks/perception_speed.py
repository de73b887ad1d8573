"""Training speed of stages vision_encoder and audio_encoder compared with peers of the same model size.

    OMP_NUM_THREADS=1 python benchmarks/perception_speed.py --data data/sample --json result.json

Images: open_clip's `train_one_epoch` with its `CLIP` of the same shape, on the same pairs and batch size.
Speech: torchaudio's Conformer with as many parameters, the same subsampling, and CTC, in a bare loop over
random batches padded to the longest; muomni's batches are bucketed by length.

Neither side reads or decodes data: batches are in memory, images as tensors (uint8 for muomni, normalized
floats for open_clip), captions padded to the context for open_clip as by its tokenizers, speech as
waveforms. muomni runs its full training loop with DeepSpeed and logging; data augmentation (scale, speed) is
off, SpecAugment and dropout are on. The two alternate in rounds of steps. A speedup above 1 means that
muomni is faster, in images or seconds of unpadded audio per second.

Takes about 4 minutes on one core; --stages, --rounds, and --steps shorten it.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_facts
from benchmarks.turns import steps_of, take_turns, training_loops
from muomni.config.loading import merge, resolve
from muomni.config.models import SAMPLE_RATE_HZ
from muomni.config.names import ENGINES
from muomni.distributed.discovery import Ranks, discover, export_environment

STAGES = ("vision_encoder", "audio_encoder")
CHANGES: dict[str, dict[str, Any]] = {
    "vision_encoder": {"batch": {"global_samples": 64}, "options": {"augmentation": None}},
    "audio_encoder": {"batch": {"global_seconds": 24}, "options": {"perturb_speed": False}},
}


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--data", default="data/sample")
    flags.add_argument("--preset", default="tiny")
    flags.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES)
    flags.add_argument("--zero", type=int, default=0, choices=(0, 1, 2))
    flags.add_argument("--rounds", type=int, default=12)
    flags.add_argument("--steps", type=int, default=4, help="steps per round")
    flags.add_argument("--json", type=Path)
    flags.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    ranks = discover()
    if ranks.world_size != 1:
        raise SystemExit("perception_speed.py supports one rank only; start it with python")
    export_environment(ranks, os.environ)
    from muomni.training.engine.process_group import process_group

    start = time.perf_counter()
    compared = {"vision_encoder": compare_images, "audio_encoder": compare_speech}
    with tempfile.TemporaryDirectory() as folder:
        sessions = {
            stage: open_session(arguments, stage, Path(folder), ranks) for stage in arguments.stages
        }
        with process_group(next(iter(sessions.values())).device):
            result: dict[str, Any] = {
                stage: compared[stage](session, arguments) for stage, session in sessions.items()
            }
    names = ("preset", "zero", "rounds", "steps")
    result["settings"] = {name: vars(arguments)[name] for name in names}
    result["machine"] = machine_facts()
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for stage in arguments.stages:
        metrics = {n: v for n, v in result[stage].items() if n != "rounds_ms"}
        print(json.dumps({stage: metrics}))
    print(f"took {time.perf_counter() - start:.0f} s")


def open_session(arguments: argparse.Namespace, stage: str, folder: Path, ranks: Ranks) -> Any:
    """Open the stage in fp32, with about one micro-batch per step."""
    from muomni.training.engine.ds_config import read_engine_json
    from muomni.training.session import Request, prepare

    num_steps = (arguments.rounds + 1) * arguments.steps
    common = {
        "data": {"root": arguments.data},
        "precision": "fp32",
        "training": {"max_steps": num_steps, "max_epochs": None},
    }
    config = resolve(stage, arguments.preset, None, merge(common, CHANGES[stage]))
    engine_json = read_engine_json(ENGINES / f"zero{arguments.zero}.json")
    run = folder / "run"
    return prepare(Request(config, run, run, engine_json, "never"), ranks)


@dataclass
class HeldBatches:
    """Replaces the loader of a training loop; cycles through batches in memory."""

    batches: list[dict[str, Any]]
    wait_s: float = 0.0

    def take_read(self) -> tuple[int, list[Any]]:
        return len(self.batches), []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return itertools.cycle(self.batches)


def hold_batches(loop: Any, num_batches: int) -> list[dict[str, Any]]:
    """Make the loop cycle through its first `num_batches` micro-batches, and return them."""
    batches = list(itertools.islice(loop.loader, num_batches))
    loop.loader = HeldBatches(batches)
    return batches


def compare_images(session: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per second, compared with open_clip's trainer."""
    from muomni.training.session import open_loop

    loop = open_loop(session)
    batches = hold_batches(loop, arguments.steps)
    num_images = sum(float(batch["units"]) for batch in batches)
    peer = open_clip_epoch(session, batches)
    return compare(loop, "open_clip", peer, num_images, num_images, arguments)


def compare_speech(session: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of audio per second, compared with a Conformer on random batches."""
    from benchmarks.speech_peer import conformer_loop, random_batches
    from muomni.training.session import open_loop

    loop = open_loop(session)
    batches = hold_batches(loop, arguments.steps)
    peer_batches = random_batches(session, arguments.steps)
    seconds = [
        sum(float(batch["lengths"].sum()) for batch in some) / SAMPLE_RATE_HZ
        for some in (batches, peer_batches)
    ]
    peer, num_parameters = conformer_loop(session, peer_batches)
    result = compare(loop, "conformer", peer, seconds[0], seconds[1], arguments)
    result["parameters"] = {
        "muomni": sum(p.numel() for p in loop.engine.task.parameters()),
        "conformer": num_parameters,
    }
    result["useful"] = {
        name: round(
            sum(float(batch["lengths"].sum()) for batch in some)
            / sum(batch["waveform"].numel() for batch in some),
            3,
        )
        for name, some in (("muomni", batches), ("conformer", peer_batches))
    }
    return result


def compare(
    loop: Any,
    name: str,
    peer: Callable[[], None],
    own_units: float,
    peer_units: float,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Measure both in turn, given the units that each processes per round."""
    with training_loops([loop]):
        variants = {"muomni": steps_of(loop, arguments.steps), name: peer}
        times = take_turns(variants, arguments.rounds, arguments.steps)
    scale, own, peer_times = own_units / peer_units, times["muomni"], times[name]
    units = {"muomni": own_units, name: peer_units}
    return {
        "speedup": round(
            scale * statistics.median(p / o for p, o in zip(peer_times, own, strict=True)), 3
        ),
        "of_minima": round(scale * min(peer_times) / min(own), 3),
        "units_per_s": {
            variant: round(1000 * units[variant] / arguments.steps / statistics.median(ms), 2)
            for variant, ms in times.items()
        },
        "median_ms": {variant: round(statistics.median(ms), 2) for variant, ms in times.items()},
        "rounds_ms": times,
    }


def open_clip_epoch(session: Any, batches: list[dict[str, Any]]) -> Callable[[], None]:
    """Return a function that runs one epoch of open_clip's trainer with the settings of the stage."""
    import open_clip
    import torch
    from open_clip_train.train import train_one_epoch

    from muomni.models.vision.convert_open_clip import open_clip_config
    from muomni.models.vision.vision_encoder import normalize_pixels

    sizes, optim, tokenizer = (
        session.stage.model_config(), session.request.config.optim, session.stage.tokenizer,
    )  # fmt: skip
    model = open_clip.CLIP(**open_clip_config(sizes, tokenizer.eos_id), output_dict=True)
    pairs = []
    for batch in batches:
        ids = torch.full((len(batch["token_ids"]), sizes.text.max_positions), tokenizer.pad_id)
        ids[:, : batch["token_ids"].shape[1]] = batch["token_ids"]
        pairs.append((normalize_pixels(batch["images"]), ids))
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}],
        lr=optim.lr,
        betas=optim.betas,
    )  # as in open_clip

    class InMemory(list):
        num_batches = len(batches)
        num_samples = sum(len(images) for images, _ in pairs)

    data = {"train": SimpleNamespace(dataloader=InMemory(pairs), set_epoch=lambda epoch: None)}
    options = SimpleNamespace(
        device="cpu", precision="fp32", distill=False, accum_freq=1, skip_scheduler=True,
        grad_clip_norm=optim.max_grad_norm, horovod=False, rank=0, local_rank=0, world_size=1,
        batch_size=len(pairs[0][0]), wandb=False,
        log_every_n_steps=session.request.config.training.log_every,
    )  # fmt: skip
    loss = open_clip.ClipLoss()

    def run() -> None:
        train_one_epoch(model, data, loss, 0, optimizer, None, None, None, options)

    return run


if __name__ == "__main__":
    main()
