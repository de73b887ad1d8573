"""Ranks share the hashing of a checkpoint; states of earlier versions load."""

from pathlib import Path
from typing import Any

import pytest

from muomni.checkpoint import export, file_list, store
from muomni.distributed import collectives
from muomni.distributed.discovery import Ranks, discover
from muomni.errors import CheckpointError
from muomni.training.session import Request, open_loop, prepare
from tests.ranks import RankPool
from tests.training.runs import thinker_config
from tests.training.stages.sft.omni_runs import omni_run, write_root

ZERO1: dict[str, Any] = {"zero_optimization": {"stage": 1}}


def test_only_the_first_rank_hashes_exports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_root(tmp_path)
    hashed: list[Path] = []
    original = export.sha256_file
    monkeypatch.setattr(export, "sha256_file", lambda path: hashed.append(path) or original(path))
    request = Request(omni_run("talker", root, {}), root / "run", root / "run", {}, "never")
    prepare(request, Ranks(1, 1, 2))
    assert not hashed
    prepare(request, Ranks(0, 0, 2))
    assert len(hashed) == 3


def _hashed_files(config: Any, run: Path) -> dict[str, list[str]]:
    """Names of the files that this rank hashes when a checkpoint is saved, and when it is loaded."""
    hashed: list[str] = []
    original = file_list.sha256_file

    def recorded(path: Path) -> str:
        hashed.append(Path(path).name)
        return original(path)

    file_list.sha256_file = recorded  # type: ignore[assignment]
    loop = open_loop(prepare(Request(config, run, run, ZERO1, "never"), discover()))
    try:
        folder = loop.save()
        saved = list(hashed)
        hashed.clear()
        topology = loop.parts.topology
        store.load(loop.engine.deepspeed, folder, topology, loop.engine.shapes_digest())
        loaded = list(hashed)
        collectives.barrier()
        error = ""
        if collectives.rank() == 0:
            damaged = next(folder.rglob("*rank_1_*optim_states.pt"))
            content = bytearray(damaged.read_bytes())
            content[len(content) // 2] ^= 1
            damaged.write_bytes(content)
        collectives.barrier()
        try:
            store.load(loop.engine.deepspeed, folder, topology, loop.engine.shapes_digest())
        except CheckpointError as found:
            error = str(found)
        return {"saved": saved, "loaded": loaded, "error": [error]}
    finally:
        file_list.sha256_file = original
        loop.engine.deepspeed.destroy()


def test_each_file_is_hashed_once_and_all_ranks_report_a_damaged_one(
    text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = thinker_config(text_data, {"training": {"ema_decay": 0.9}})
    first, second = two_ranks.run(_hashed_files, config=config, run=tmp_path)
    (checkpoint,) = (tmp_path / "thinker" / "checkpoints").glob("step_*")
    names = sorted(path.name for path in checkpoint.rglob("*") if path.is_file())
    names.remove("complete.json")
    for phase in ("saved", "loaded"):
        assert sorted(first[phase] + second[phase]) == names
        assert first[phase] and second[phase]
    own = [name for name in names if "rank_1" in name or "00001" in name]
    assert len(own) == 3 and set(own) <= set(second["saved"])
    assert first["error"] == second["error"]
    assert "rank_1" in first["error"][0] and "differs" in first["error"][0]


def test_the_state_of_an_earlier_version_loads_without_its_mlflow_run() -> None:
    saved = {"step": 7, "plan_digest": "d", "best": 1.5, "mlflow_run_id": "a", "units_seen": 2.0}
    assert store.TrainState.of({"state": saved}) == store.TrainState(7, "d", 1.5, 2.0)
