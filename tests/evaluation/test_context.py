"""Invalid evaluations are rejected with a remedy."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from muomni.checkpoint.export import read_export
from muomni.config.loading import merge
from muomni.errors import DataError, UpstreamError
from muomni.evaluation.context import _upstream_exports, _upstream_run, open_context
from muomni.evaluation.request import EvaluationRequest
from muomni.run_folder import RunFolder
from tests.corpora import sentences, write_tokenizer
from tests.evaluation.runs import CPU, evaluate, three_splits, untrained_export, write_texts
from tests.training.runs import thinker_config


def test_missing_export_names_command(tmp_path: Path) -> None:
    with pytest.raises(UpstreamError, match=r"no export of stage thinker.*--stage thinker"):
        evaluate(stage="thinker", run=tmp_path)


def change_manifest(run: Path, stage: str, change: Callable[[dict[str, Any]], None]) -> None:
    manifest = run / stage / "export" / "export.json"
    content = json.loads(manifest.read_text())
    change(content)
    manifest.write_text(json.dumps(content))


def test_an_export_without_config_is_rejected(thinker_run: Path, tmp_path: Path) -> None:
    shutil.copytree(thinker_run, tmp_path, dirs_exist_ok=True)
    change_manifest(tmp_path, "thinker", lambda content: content.pop("config"))
    with pytest.raises(
        UpstreamError, match=r"export does not record its config; train stage thinker"
    ):
        evaluate(stage="thinker", run=tmp_path)


def test_the_config_of_a_later_start_does_not_matter(thinker_run: Path, tmp_path: Path) -> None:
    """The export was trained with sequences of 64 tokens, and a later start uses others."""
    shutil.copytree(thinker_run, tmp_path, dirs_exist_ok=True)
    config = read_export(tmp_path / "thinker" / "export", "thinker").run_config
    later = merge(config.model_dump(mode="json"), {"batch": {"seq_len": 16}})
    RunFolder(tmp_path, "thinker").write_config(later, {})
    expected = evaluate(stage="thinker", run=thinker_run)
    assert evaluate(stage="thinker", run=tmp_path)["metrics"] == expected["metrics"]


def test_missing_split_lists_available_splits(thinker_run: Path) -> None:
    with pytest.raises(
        DataError, match=r"has a split 'dev'; set --split to one of test, train, val"
    ):
        evaluate(stage="thinker", run=thinker_run, split="dev")


def test_training_split_must_be_requested(thinker_run: Path) -> None:
    assert evaluate(stage="thinker", run=thinker_run)["split"] == "test"
    assert evaluate(stage="thinker", run=thinker_run, split="train")["num_samples"] == 120


def test_weights_of_other_size_are_rejected(thinker_run: Path, tmp_path: Path) -> None:
    shutil.copytree(thinker_run, tmp_path, dirs_exist_ok=True)
    change_manifest(
        tmp_path, "thinker", lambda content: content["config"]["model"].update(intermediate_size=48)
    )
    with pytest.raises(UpstreamError, match=r"differs in size: 'stack.*train stage thinker with"):
        evaluate(stage="thinker", run=tmp_path)


def test_test_split_with_trained_groups_is_rejected(thinker_run: Path, tmp_path: Path) -> None:
    """The corpus was resharded, so training groups are now in the test split."""
    texts = three_splits()
    write_texts(tmp_path / "text", {"test": texts["test"]}, key="train")
    with pytest.raises(DataError, match=r"31 of 31 samples.*trained on.*--split train"):
        evaluate(stage="thinker", run=thinker_run, data=tmp_path)


def test_an_accepted_overlap_is_evaluated_and_reported(
    thinker_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = three_splits()
    train, test = texts["train"][:40], texts["test"][:9]
    # Keys are groups: all 9 groups of test are in train.
    manifest = write_texts(tmp_path / "data" / "text", {"train": train, "test": test}, key="k")
    shutil.copytree(thinker_run, tmp_path / "run")
    root = str(tmp_path / "data")
    change_manifest(
        tmp_path / "run", "thinker", lambda content: content["config"]["data"].update(root=root)
    )
    with pytest.raises(DataError, match=r"9 of 9 samples.*trained on"):
        evaluate(stage="thinker", run=tmp_path / "run")
    path = tmp_path / "data" / "text" / "manifest.json"
    path.write_text(manifest.model_copy(update={"overlap": {"test": 8}}).to_json())
    with pytest.raises(DataError, match=r"9 of 9 samples.*trained on"):
        evaluate(stage="thinker", run=tmp_path / "run")
    path.write_text(manifest.model_copy(update={"overlap": {"test": 9}}).to_json())
    with caplog.at_level(logging.WARNING):
        result = evaluate(stage="thinker", run=tmp_path / "run")
    assert result["num_seen"] == 9
    assert "9 of 9 samples in split 'test'" in caplog.text and "--overlap allow" in caplog.text


def test_duplicate_contents_log_a_warning(
    thinker_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    repeated = [*sentences(120, 1)[:4], "quite another sentence"]
    write_texts(tmp_path / "other", {"test": repeated})
    with caplog.at_level(logging.WARNING):
        assert evaluate(stage="thinker", run=thinker_run, data=tmp_path)["num_samples"] == 5
    assert "4 of 5 samples in split 'test' duplicate the content" in caplog.text


def test_no_baseline_without_training_data(
    thinker_run: Path, three_way_text: Path, tmp_path: Path
) -> None:
    shutil.copytree(thinker_run, tmp_path / "run")
    gone = str(tmp_path / "gone")
    change_manifest(
        tmp_path / "run", "thinker", lambda content: content["config"]["data"].update(root=gone)
    )
    write_texts(tmp_path / "data" / "other", {"test": sentences(5, 7)})
    result = evaluate(stage="thinker", run=tmp_path / "run", data=tmp_path / "data")
    assert result["baselines"] == {}
    with pytest.raises(DataError, match="gone does not exist"):
        evaluate(stage="thinker", run=tmp_path / "run")


def test_upstream_run_is_same_run_or_recorded_run(thinker_run: Path, tmp_path: Path) -> None:
    elsewhere = str(tmp_path)
    assert (
        _upstream_run(EvaluationRequest("sft", thinker_run), ("thinker",), elsewhere) == thinker_run
    )
    assert (
        _upstream_run(EvaluationRequest("sft", tmp_path), ("thinker",), str(thinker_run))
        == thinker_run
    )
    assert _upstream_run(EvaluationRequest("sft", tmp_path), ("thinker",), None) == tmp_path
    explicit = EvaluationRequest("sft", thinker_run, upstream=tmp_path)
    assert _upstream_run(explicit, ("thinker",), str(thinker_run)) == tmp_path


def test_the_recorded_upstream_run_is_relative_to_the_run(thinker_run: Path) -> None:
    request = EvaluationRequest("sft", thinker_run)
    assert _upstream_run(request, ("codec",), ".") == thinker_run
    assert _upstream_run(request, ("codec",), "parts") == thinker_run / "parts"


def test_a_retrained_upstream_export_is_rejected(thinker_run: Path, tmp_path: Path) -> None:
    """Unless the export contains its upstream models."""
    shutil.copytree(thinker_run, tmp_path, dirs_exist_ok=True)
    change_manifest(tmp_path, "thinker", lambda content: content.update(upstream={"thinker": "0"}))
    export = read_export(tmp_path / "thinker" / "export", "thinker")
    with pytest.raises(UpstreamError, match=r"is not the one that export .* was trained with"):
        _upstream_exports(export, thinker_run, ("thinker",))
    assert _upstream_exports(export, thinker_run, ("thinker",), is_complete=True)


def test_upstream_export_with_other_tokenizer_is_rejected(
    thinker_run: Path, three_way_text: Path, tmp_path: Path
) -> None:
    shutil.copytree(three_way_text / "text", tmp_path / "data" / "text")
    write_tokenizer(tmp_path / "data" / "tokenizer.model", vocab_size=340)
    untrained_export(thinker_config(tmp_path / "data"), tmp_path / "run")
    export = read_export(thinker_run / "thinker" / "export", "thinker")
    with pytest.raises(UpstreamError, match=r"have different tokenizers; retrain stage thinker"):
        _upstream_exports(export, tmp_path / "run", ("thinker",))
    with pytest.raises(UpstreamError, match=r"has no export of talker; create it with"):
        _upstream_exports(export, thinker_run, ("thinker", "talker"))


def test_context_has_exported_weights(thinker_run: Path) -> None:
    context = open_context(EvaluationRequest("thinker", thinker_run), CPU)
    state = read_export(thinker_run / "thinker" / "export", "thinker").state()
    own = context.model.state_dict()
    assert own.keys() == state.keys()
    assert all(own[name].equal(tensor) for name, tensor in state.items())
    assert not context.task.training
