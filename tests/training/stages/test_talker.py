"""Stage talker: dependence on the text, learned stop, and errors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.distributed.discovery import discover
from muomni.errors import ConfigError, UpstreamError
from muomni.models.speech.talker import Talker
from muomni.training.session import Request, Session, prepare
from tests.parity.reference import reference_curve
from tests.ranks import RankPool
from tests.training.runs import train
from tests.training.stages.sft.omni_runs import omni_run, write_root


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_root(tmp_path_factory.mktemp("talker"))


def open_session(root: Path, changes: dict[str, Any] | None = None) -> Session:
    engine_json: dict[str, Any] = {"zero_optimization": {"stage": 0}}
    config = omni_run("talker", root, changes)
    return prepare(Request(config, root / "none", root / "run", engine_json, "never"), discover({}))


def test_a_run_reports_accuracies(root: Path, tmp_path: Path, one_rank: RankPool) -> None:
    config = omni_run("talker", root, {"training": {"max_steps": 2}})
    result = one_rank.run(train, config=config, run=tmp_path, upstream=root / "run")[0]
    assert {"val/loss", "val/accuracy", "val/accuracy_1", "val/stop_accuracy"} <= result.keys()


def test_it_learns_words_lengths_and_stops(root: Path) -> None:
    """After a short run, codes depend on the text, another text is unlikely, and speech stops."""
    batch = {"global_seconds": 3, "micro_seconds": 3}
    changes = {"training": {"max_steps": 250}, "batch": batch, "optim": {"lr": 5e-3}}
    curve, task = reference_curve(omni_run("talker", root, changes), root / "run")
    session = open_session(root, changes)
    stage, view = session.stage, session.stage.view()
    talker = stage.model(task.eval())
    assert isinstance(talker, Talker)
    # Audio clips 0 to 2 are the three words at equal length.
    said = [[view.example(session.planned.source.read(index), None)] for index in (0, 1, 2)]
    spoken = stage.prepare(view.collate(said))
    with torch.no_grad():
        right = task(spoken).logs
        other_text = {
            key: spoken[key].roll(1, 0) for key in ("text_ids", "character_ids", "text_mask")
        }
        wrong = task({**spoken, **other_text}).logs
    assert ratio(right["loss"]) < 0.3 * curve.losses[0]
    assert ratio(wrong["loss"]) > 2 * ratio(right["loss"])
    text = (spoken[key] for key in ("text_ids", "character_ids", "text_mask"))
    made = talker.generate(*text, max_frames=40, temperature=0)
    assert bool(made.stopped.all())
    # 0.3 and 0.5 s, and in training a silence of up to a frame
    assert set(made.lengths.tolist()) <= {8, 9, 13, 14}


def ratio(pair: torch.Tensor) -> float:
    return float(pair[0] / pair[1])


def test_a_missing_codec_is_reported_with_its_command(root: Path, tmp_path: Path) -> None:
    request = Request(omni_run("talker", root), tmp_path, tmp_path, {}, "never")
    with pytest.raises(UpstreamError, match=r"no export of codec; .*--stage codec"):
        prepare(request, discover({}))


def test_thinker_hidden_size_is_rejected(root: Path) -> None:
    with pytest.raises(ConfigError, match="thinker_hidden_size"):
        open_session(root, {"model": {"thinker_hidden_size": 4}})
