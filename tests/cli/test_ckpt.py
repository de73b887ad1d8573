"""`muomni ckpt ls`: complete and damaged checkpoints, their marks, and JSON."""

import json
from pathlib import Path

import pytest

from muomni.cli.main import main
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train


def test_checkpoints_are_listed_with_their_state(
    one_rank: RankPool, text_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"max_steps": 4, "save_every": 2, "recorders": []}
    one_rank.run(train, config=thinker_config(text_data, {"training": training}), run=tmp_path)
    main(["ckpt", "ls", str(tmp_path), "--json"])
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(row["step"], row["state"], row["ranks"]) for row in rows] == [
        (2, "complete", 1),
        (4, "complete", 1),
    ]
    assert "latest" in rows[-1]["marks"] and rows[-1]["megabytes"] >= 0
    damaged = next((tmp_path / "thinker" / "checkpoints" / "step_00000002").rglob("*.pt"))
    damaged.write_bytes(damaged.read_bytes()[:-1])
    main(["ckpt", "ls", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == [
        "stage",
        "step",
        "MB",
        "ranks",
        "ZeRO",
        "precision",
        "state",
        "marks",
    ]
    assert "is damaged" in lines[1] and "complete" in lines[2]
