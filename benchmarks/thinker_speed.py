"""Step time of stage thinker compared with peers of the same shape, and the gain of packing over padding.

    pip install --no-deps --target PEERS accelerate==1.15.0
    OMP_NUM_THREADS=1 PYTHONPATH=PEERS python benchmarks/thinker_speed.py --data data/sample

Runs in one process on one rank. muomni is the full training loop with DeepSpeed: it reads, packs, masks
attention across documents, counts FLOPs, and logs. Peers have their batches in memory: Hugging Face's Trainer
with DeepSpeed, the same model in a bare torch loop, and a plain GPT in a loop like nanoGPT's. All use the same
sequence length and batch size, AdamW, and gradient clipping, and alternate in rounds of steps. A speedup above
1 means that muomni is faster: the median over rounds of peer time / muomni time, and the ratio of the minima.

The packing comparison counts labeled tokens per second, against one document per row, padded to the longest of
the batch or to the context, with about as many positions per batch as a step of muomni.

Takes about 4 minutes per shape on one core; --rounds and --steps shorten it.
"""

import argparse
import importlib.util
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_facts
from benchmarks.turns import steps_of, take_turns, training_loops
from muomni.config.loading import merge, resolve
from muomni.config.names import ENGINES
from muomni.distributed.discovery import discover, export_environment

OURS = "muomni"
# Preset, overrides, and vocabulary size (None: that of the tokenizer).
SHAPES: dict[str, tuple[str, dict[str, Any], int | None]] = {
    "tiny": ("tiny", {}, None),
    "gpt2": (
        "small",
        {
            "model": {"num_layers": 12, "num_kv_heads": 12, "max_positions": 1024},
            "batch": {"seq_len": 512, "global_tokens": 512, "micro_sequences": 1},
        },
        32_768,
    ),
}
PEERS = ("llama_trainer", "llama_bare", "qwen3_bare", "plain_gpt")
PADDED = ("llama_padded_to_longest", "llama_padded_to_context", "muomni_padded_to_longest")


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--data", default="data/sample")
    flags.add_argument("--shape", default="tiny", choices=SHAPES, help="gpt2: shape of GPT-2 small")
    flags.add_argument("--peers", nargs="+", default=PEERS, choices=PEERS)
    flags.add_argument("--no-packing", action="store_true", help="skip the padded batches")
    flags.add_argument("--zero", type=int, default=0, choices=(0, 1, 2))
    flags.add_argument("--threads", type=int, default=1)
    flags.add_argument("--rounds", type=int, default=12)
    flags.add_argument("--steps", type=int, default=4, help="steps per round")
    flags.add_argument("--json", type=Path)
    flags.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = flags.parse_args()
    if "llama_trainer" in arguments.peers and importlib.util.find_spec("accelerate") is None:
        raise SystemExit(
            "Hugging Face's Trainer needs accelerate; install it, or omit llama_trainer from --peers"
        )
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # for threads that start later
    ranks = discover()
    if ranks.world_size != 1:
        raise SystemExit("thinker_speed.py supports one rank only; start it with python")
    export_environment(ranks, os.environ)
    import torch

    torch.set_num_threads(arguments.threads)
    from muomni.training.engine.process_group import process_group

    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(arguments, Path(folder), ranks)
        with process_group(session.device):
            result = compare(session, arguments, Path(folder))
    settings = {n: vars(arguments)[n] for n in ("shape", "zero", "threads", "rounds", "steps")}
    result |= {"settings": settings, "machine": machine_facts()}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({name: result[name] for name in ("speedup", "of_minima", "useful")}))
    print(f"took {time.perf_counter() - start:.0f} s")


def open_session(arguments: argparse.Namespace, folder: Path, ranks: Any) -> Any:
    """Open the stage with this shape in fp32, with enough steps for all rounds."""
    from muomni.training.engine.ds_config import read_engine_json
    from muomni.training.session import Request, prepare
    from muomni.training.stages.thinker import ThinkerStage

    preset, changes, vocabulary = SHAPES[arguments.shape]
    num_steps = (arguments.rounds + 1) * arguments.steps
    common = {
        "data": {"root": arguments.data},
        "precision": "fp32",
        "training": {"max_steps": num_steps, "max_epochs": None},
    }
    config = resolve("thinker", preset, None, merge(common, changes))
    engine_json = read_engine_json(ENGINES / f"zero{arguments.zero}.json")
    run = folder / "run"
    session = prepare(Request(config, run, run, engine_json, "never"), ranks)

    class WideThinkerStage(ThinkerStage):
        """A vocabulary larger than that of the sample tokenizer."""

        def model_config(self) -> Any:
            return super().model_config().model_copy(update={"vocab_size": vocabulary})

    if vocabulary is not None:
        session.stage = WideThinkerStage(config, session.stage.context)
    return session


def compare(session: Any, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Measure all variants in turn and compute the ratios."""
    from muomni.training.session import open_loop

    num_batches = arguments.steps * session.feed.num_micro_batches(0)
    loop = open_loop(session)
    variants, close = peers(session, arguments, num_batches, folder)
    useful: dict[str, float] = {}  # labels per step
    if not arguments.no_packing:
        variants |= padded_variants(session, arguments, useful)
    with training_loops([loop]):
        times = take_turns(
            {OURS: steps_of(loop, arguments.steps), **variants}, arguments.rounds, arguments.steps
        )
        loop.log()
    close()
    useful[OURS] = loop.state.units_seen / loop.state.step
    own, minimum = times[OURS], min(times[OURS])
    peer_names = [name for name in times if name not in (OURS, *PADDED)]

    def ratio(peer: list[float]) -> float:
        return statistics.median(p / o for p, o in zip(peer, own, strict=True))

    result: dict[str, Any] = {
        "speedup": {name: round(ratio(times[name]), 3) for name in peer_names},
        "of_minima": {name: round(min(times[name]) / minimum, 3) for name in peer_names},
        "useful": {
            name: round(ratio(times[name]) * useful[OURS] / useful[name], 2)
            for name in PADDED
            if name in times
        },
        "labels_per_step": useful,
        "positions_per_step": session.request.config.batch.seq_len
        * session.request.config.batch.micro_sequences
        * session.feed.num_micro_batches(0),
        "median_ms": {name: round(statistics.median(t), 2) for name, t in times.items()},
        "minimum_ms": {name: round(min(t), 2) for name, t in times.items()},
        "rounds_ms": times,
    }
    if {"llama_trainer", "llama_bare"} <= times.keys():
        pairs = zip(times["llama_trainer"], times["llama_bare"], strict=True)
        result["trainer_over_bare"] = round(statistics.median(t / b for t, b in pairs), 3)
        print(f"Hugging Face's Trainer / bare loop: {result['trainer_over_bare']}")
    return result


def peers(
    session: Any, arguments: argparse.Namespace, num_batches: int, folder: Path
) -> tuple[dict[str, Callable[[], None]], Callable[[], None]]:
    """Return functions that run a round of each peer, and one that closes them."""
    import torch

    from benchmarks.language_peers import PlainGpt, TrainerTurns, bare_loop, hugging_face

    sizes, optim = session.stage.model_config(), session.request.config.optim
    batch, generator = session.request.config.batch, torch.Generator().manual_seed(0)
    shape = (num_batches, batch.micro_sequences, batch.seq_len)
    # Step time does not depend on the token values.
    ids = torch.randint(sizes.vocab_size, shape, generator=generator)
    rows = [{"input_ids": row, "labels": row.clone()} for row in ids]
    variants: dict[str, Callable[[], None]] = {}
    close: Callable[[], None] = lambda: None  # noqa: E731
    for name in arguments.peers:
        if name == "plain_gpt":
            gpt = PlainGpt(sizes)
            loss_of = lambda batch, model=gpt: model(**batch)  # noqa: E731
            variants[name] = bare_loop(gpt, loss_of, rows, session.feed.num_micro_batches(0), optim)
            continue
        model = hugging_face(name.partition("_")[0], sizes)
        if name.endswith("_bare"):
            loss_of = lambda batch, model=model: model(**batch).loss  # noqa: E731
            variants[name] = bare_loop(
                model, loss_of, rows, session.feed.num_micro_batches(0), optim
            )
        else:
            settings = {
                "deepspeed": trainer_engine(session.request.engine_json),
                "logging_steps": session.request.config.training.log_every,
            }
            trainer = TrainerTurns(
                model, rows, session.feed.num_micro_batches(0), optim, settings, folder / "trainer"
            )
            variants[name], close = trainer, trainer.close
    return variants, close


def trainer_engine(engine_json: dict[str, Any]) -> dict[str, Any]:
    """The engine JSON with "auto" for the sizes that the Trainer sets."""
    names = (
        "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps",
        "gradient_clipping",
    )  # fmt: skip
    return {**engine_json, **dict.fromkeys(names, "auto")}


def padded_variants(
    session: Any, arguments: argparse.Namespace, useful: dict[str, float]
) -> dict[str, Callable[[], None]]:
    """Return functions that train on padded documents, one batch per step; sets labels per step in `useful`."""
    from benchmarks.language_peers import bare_loop, hugging_face, padded_batches

    sizes, config, stage = (
        session.stage.model_config(), session.request.config, session.stage,
    )  # fmt: skip
    batch, optim, num_steps = config.batch, config.optim, arguments.steps
    view, pad_id = stage.view(), stage.tokenizer.pad_id
    positions = batch.seq_len * batch.micro_sequences * session.feed.num_micro_batches(0)
    num_wide = positions // batch.seq_len
    # The largest number of rows that, padded to the longest, fits into the same positions.
    num_rows = next(
        n
        for n in itertools.count(1)
        if (n + 1) * mean_longest(documents(session, view), n + 1) > positions
    )
    variants: dict[str, Callable[[], None]] = {}
    for name, rows, width in (
        ("llama_padded_to_longest", num_rows, None),
        ("llama_padded_to_context", num_wide, batch.seq_len),
    ):
        batches = padded_batches(documents(session, view), rows, num_steps, width, pad_id)
        model = hugging_face("llama", sizes)
        loss_of = lambda batch, model=model: model(**batch).loss  # noqa: E731
        variants[name] = bare_loop(model, loss_of, batches, 1, optim)
        useful[name] = sum(float(b["attention_mask"][:, 1:].sum()) for b in batches) / num_steps
    name, task = "muomni_padded_to_longest", stage.build()
    own = own_padded_batches(documents(session, view), num_rows, num_steps, pad_id)
    variants[name] = bare_loop(
        task, lambda b: task(b).losses["loss"] / float(b["units"]), own, 1, optim
    )
    useful[name] = sum(float(b["units"]) for b in own) / num_steps
    return variants


def documents(session: Any, view: Any) -> Iterator[list[int]]:
    """Token ids of training documents in random order, endlessly."""
    import numpy as np

    read, random = view.reader(session.planned.source), np.random.default_rng(0)
    while True:
        yield np.asarray(read(int(random.integers(len(session.planned.source))), None).ids).tolist()


def mean_longest(texts: Iterator[list[int]], num_rows: int, num_batches: int = 20) -> float:
    """Mean over batches of the length of the longest of `num_rows` documents."""
    return statistics.mean(
        max(len(next(texts)) - 1 for _ in range(num_rows)) for _ in range(num_batches)
    )


def own_padded_batches(
    texts: Iterator[list[int]], num_rows: int, num_batches: int, pad_id: int
) -> list[dict[str, Any]]:
    """Padded batches in the format of stage thinker, one document per row."""
    import torch

    from muomni.data.sampling.packing import document_starts

    batches = []
    for _ in range(num_batches):
        rows = [torch.tensor(next(texts)) for _ in range(num_rows)]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
        lengths = torch.tensor([len(ids) - 1 for ids in rows])
        is_real = torch.arange(padded.shape[1] - 1) < lengths[:, None]
        batches.append(
            {
                "input_ids": padded[:, :-1].contiguous(),
                "labels": padded[:, 1:].masked_fill(~is_real, -100),
                "document_ids": is_real.long(),
                "document_starts": torch.from_numpy(document_starts(is_real.numpy())),
                "longest_document": torch.tensor(is_real.shape[1]),
                "num_bytes": torch.tensor(1.0),
                "units": is_real.sum().float(),
            }
        )
    return batches


if __name__ == "__main__":
    main()
