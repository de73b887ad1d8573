"""Steps of stages vision_encoder and audio_encoder beside trainers of others, models of the same size.

    OMP_NUM_THREADS=1 python benchmarks/perception_speed.py --data data/sample --json result.json

Images: open_clip's own `train_one_epoch` over the same towers (its `CLIP`), the same pairs, as many a
step. Speech: torchaudio's Conformer of as many parameters behind the same subsampling, with CTC, in a bare
loop over batches of audio clips drawn at random and padded to the longest; muomni's batches are of like
lengths.

Neither side reads or decodes: batches are in memory, images as tensors (muomni's as bytes, open_clip's
as normalized floats), captions padded to the context for open_clip as its tokenizers do it, speech as
waveforms. muomni is the whole training loop with DeepSpeed, logging included; augmentation of what is
read (scale, speed) is off, SpecAugment and dropout are on. They take turns, a round of steps each. Above 1
means that muomni is faster: images, or seconds of audio clips without padding, a second.

Takes about 4 minutes on one core; --stages, --rounds and --steps shorten it.
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
from muomni.config.loading import CONFIG_ROOT, merge, resolve
from muomni.config.models import SAMPLE_RATE_HZ
from muomni.distributed.discovery import Ranks, discover, export_environment

STAGES = ("vision_encoder", "audio_encoder")
CHANGES: dict[str, dict[str, Any]] = {
    "vision_encoder": {"options": {"augmentation": None}},
    "audio_encoder": {"options": {"perturb_speed": False}},
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
    flags.add_argument("--steps", type=int, default=4, help="steps a round")
    flags.add_argument("--json", type=Path)
    flags.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    ranks = discover()
    if ranks.world_size != 1:
        raise SystemExit("perception_speed.py compares single ranks; start it with python")
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
    """The stage in fp32 with one micro-batch a step."""
    from muomni.training.engine.ds_config import read_engine_json
    from muomni.training.session import Request, prepare

    num_steps = (arguments.rounds + 1) * arguments.steps
    common = {
        "data": {"root": arguments.data},
        "precision": "fp32",
        "batch": {"micro_batches_per_step": 1},
        "training": {"max_steps": num_steps, "max_epochs": None},
    }
    config = resolve(stage, arguments.preset, None, merge(common, CHANGES[stage]))
    engine_json = read_engine_json(CONFIG_ROOT / "deepspeed" / f"zero{arguments.zero}.json")
    run = folder / "run"
    return prepare(Request(config, run, run, engine_json, "never"), ranks)


@dataclass
class HeldBatches:
    """What a loop takes for its loader: the same few batches again and again, from memory."""

    batches: list[dict[str, Any]]
    wait_s: float = 0.0
    num_bad: int = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return itertools.cycle(self.batches)


def hold_batches(loop: Any, num_batches: int) -> list[dict[str, Any]]:
    """Let the loop go round its first `num_batches` micro-batches, and return them."""
    batches = list(itertools.islice(loop.loader, num_batches))
    loop.loader = HeldBatches(batches)
    return batches


def compare_images(session: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Images a second beside open_clip's trainer."""
    from muomni.training.session import open_loop

    loop = open_loop(session)
    batches = hold_batches(loop, arguments.steps)
    num_images = sum(float(batch["units"]) for batch in batches)
    peer = open_clip_epoch(session, batches)
    return in_turn(loop, "open_clip", peer, num_images, num_images, arguments)


def compare_speech(session: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of audio clips a second beside a Conformer on random batches."""
    from benchmarks.speech_peer import conformer_loop, random_batches
    from muomni.training.session import open_loop

    loop = open_loop(session)
    batches = hold_batches(loop, arguments.steps)
    theirs = random_batches(session, arguments.steps)
    seconds = [
        sum(float(batch["lengths"].sum()) for batch in some) / SAMPLE_RATE_HZ
        for some in (batches, theirs)
    ]
    peer, num_parameters = conformer_loop(session, theirs)
    result = in_turn(loop, "conformer", peer, seconds[0], seconds[1], arguments)
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
        for name, some in (("muomni", batches), ("conformer", theirs))
    }
    return result


def in_turn(
    loop: Any,
    name: str,
    peer: Callable[[], None],
    our_units: float,
    their_units: float,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Rates of both, given what a round of each counts."""
    with training_loops([loop]):
        ways = {"muomni": steps_of(loop, arguments.steps), name: peer}
        times = take_turns(ways, arguments.rounds, arguments.steps)
    more, ours, theirs = our_units / their_units, times["muomni"], times[name]
    units = {"muomni": our_units, name: their_units}
    return {
        "speedup": round(
            more * statistics.median(t / o for t, o in zip(theirs, ours, strict=True)), 3
        ),
        "of_minima": round(more * min(theirs) / min(ours), 3),
        "units_per_s": {
            way: round(1000 * units[way] / arguments.steps / statistics.median(ms), 2)
            for way, ms in times.items()
        },
        "median_ms": {way: round(statistics.median(ms), 2) for way, ms in times.items()},
        "rounds_ms": times,
    }


def open_clip_epoch(session: Any, batches: list[dict[str, Any]]) -> Callable[[], None]:
    """One epoch of open_clip's trainer over the batches, with the settings of the stage."""
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
    )  # as open_clip makes it

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
