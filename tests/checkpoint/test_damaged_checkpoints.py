"""Damaged, hostile, and foreign checkpoints: the run takes an older one, or refuses in one sentence."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.checkpoint import file_list
from muomni.config.run import RunConfig
from muomni.errors import CheckpointError
from muomni.io.hashing import sha256_file
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train


@pytest.fixture
def config(text_data: Path) -> RunConfig:
    return thinker_config(
        text_data, {"training": {"save_every": 2, "max_steps": 6, "keep_last": 9}}
    )


@pytest.fixture
def checkpoints(config: RunConfig, tmp_path: Path, one_rank: RankPool) -> Path:
    """The checkpoints of steps 2, 4, and 6 of a finished run, whose export is removed."""
    one_rank.run(train, config=config, run=tmp_path / "run")
    shutil.rmtree(tmp_path / "run/thinker/export")
    return tmp_path / "run/thinker/checkpoints"


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_costs_only_the_newest_checkpoint(
    config: RunConfig, checkpoints: Path, one_rank: RankPool
) -> None:
    run = checkpoints.parents[1]
    whole = [line["loss"] for line in _curve(run)]
    _flip(next((checkpoints / "step_00000006").rglob("*model_states.pt")))
    result = one_rank.run(train, config=config, run=run)[0]
    assert result["step"] == 6 and result["losses"] == whole
    # The damaged one was replaced.
    file_list.verify(checkpoints / "step_00000006")


def _curve(run: Path) -> list[dict[str, Any]]:
    lines = (run / "thinker/metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "train"]


@pytest.mark.parametrize("damage", [_flip, lambda path: path.write_bytes(b"")])
def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(
    damage: Callable[[Path], None], config: RunConfig, checkpoints: Path, one_rank: RankPool
) -> None:
    for path in checkpoints.rglob("*model_states.pt"):
        damage(path)
    before = sorted(path.name for path in checkpoints.iterdir())
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is complete; restore one, or"):
        one_rank.run(train, config=config, run=checkpoints.parents[1])
    assert sorted(path.name for path in checkpoints.iterdir()) == before
    assert len(_curve(checkpoints.parents[1])) == 6


class _Bomb:
    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self._target,))


@pytest.mark.parametrize("file", ["rng_rank_00000.pt", "*model_states.pt", "*optim_states.pt"])
def test_a_checkpoint_cannot_run_code(
    file: str, config: RunConfig, checkpoints: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    folder, bomb = checkpoints / "step_00000004", tmp_path / "exploded"
    path = next(folder.rglob(file))
    torch.save({"bomb": _Bomb(bomb)}, path)
    torch.load(path, weights_only=False)  # shows that the bomb works
    bomb.unlink()
    listing = folder / file_list.FILE_LIST
    content = json.loads(listing.read_text())
    name = str(path.relative_to(folder))
    content["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    listing.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="holds objects that could run code"):
        one_rank.run(train, config=config, run=tmp_path / "other", resume=str(folder))
    assert not bomb.exists()


_FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda content: [], "schema version None"),
    "no files": (lambda content: {**content, "files": {}}, "lists no files"),
    "no state": (lambda content: {**content, "state": None}, "has no state"),
    "no topology": (lambda content: {**content, "topology": []}, "has no topology"),
    "outside": (lambda content: {**content, "files": {"../x": {}}}, "outside of the checkpoint"),
    "no hash": (lambda content: {**content, "files": {"x": {"bytes": 1}}}, "no size and hash of x"),
    "other step": (
        lambda content: {**content, "state": {**content["state"], "step": 3}},
        "is of step 3",
    ),
}


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_wrong_file_list_is_damage(fault: str, tmp_path: Path) -> None:
    change, words = _FAULTS[fault]
    folder = tmp_path / "step_00000002"
    folder.mkdir()
    content = {
        "schema_version": 1,
        "state": {"step": 2},
        "topology": {"world_size": 1},
        "files": {"x": {"bytes": 0, "sha256": "0"}},
    }
    (folder / file_list.FILE_LIST).write_text(json.dumps(change(content)))
    with pytest.raises(CheckpointError, match=words):
        file_list.verify(folder)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b'{"schema_version": 1', pickle.dumps({})])
def test_a_file_list_of_other_bytes_is_damage(content: bytes, tmp_path: Path) -> None:
    (tmp_path / file_list.FILE_LIST).write_bytes(content)
    with pytest.raises(CheckpointError, match="is incomplete"):
        file_list.verify(tmp_path)


@pytest.mark.parametrize("mark", [b"", b"\xff\xff", b"../../other\n", b"step_00000009\n"])
def test_a_mark_that_names_no_checkpoint_is_ignored(mark: bytes, tmp_path: Path) -> None:
    (tmp_path / "step_00000002").mkdir()
    (tmp_path / "best").write_bytes(mark)
    assert file_list.marked(tmp_path, "best") is None
    (tmp_path / "best").write_text("step_00000002\n")
    assert file_list.marked(tmp_path, "best") == tmp_path / "step_00000002"
