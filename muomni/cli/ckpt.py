"""`muomni ckpt ls`: the checkpoints of a run."""

import argparse
import json
from pathlib import Path
from typing import Any

from muomni.command_line import path
from muomni.errors import CheckpointError

SUMMARY = "List the checkpoints of a run with their step, size, state, and marks."
EXAMPLES = ("muomni ckpt ls runs/first", "muomni ckpt ls runs/first --verify --json")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the action and the run."""
    parser.add_argument("action", choices=("ls",), help="ls: list")
    parser.add_argument("run", type=path, help="run folder, with one folder per stage")
    parser.add_argument(
        "--verify", action="store_true", help="also compare the SHA-256 of every file"
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object instead of a table"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print one line per checkpoint; raises CheckpointError if there is none."""
    from muomni.config.registry import STAGES
    from muomni.io.table import format_table

    rows = [
        row for stage in STAGES for row in _rows(arguments.run, stage, with_hashes=arguments.verify)
    ]
    if not rows:
        raise CheckpointError(f"{arguments.run} has no checkpoints; pass a run folder")
    if arguments.json:
        print(json.dumps({"run": str(arguments.run), "checkpoints": rows}))
        return
    headers = ["stage", "step", "MB", "ranks", "ZeRO", "precision", "state", "marks"]
    print(format_table(headers, [list(row.values()) for row in rows]))


def _rows(run: Path, stage: str, with_hashes: bool) -> list[dict[str, Any]]:
    from muomni.checkpoint import file_list
    from muomni.run_folder import RunFolder

    root = RunFolder(run, stage).checkpoints
    marks = {name: file_list.marked(root, name) for name in ("latest", "best")}
    rows = []
    for folder in sorted(root.glob("step_*")):
        row = {
            "stage": stage,
            "step": int(folder.name.removeprefix("step_")),
            "megabytes": round(
                sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6
            ),
            "ranks": "-",
            "zero_stage": "-",
            "precision": "-",
            "state": "complete",
            "marks": " ".join(name for name, marked in marks.items() if marked == folder),
        }
        try:
            topology = file_list.verify(folder, with_hashes)["topology"]
        except CheckpointError as error:
            row["state"] = str(error)
        else:
            row |= {"ranks": topology["world_size"], "zero_stage": topology["zero_stage"]}
            row["precision"] = topology["precision"]
        rows.append(row)
    return rows
