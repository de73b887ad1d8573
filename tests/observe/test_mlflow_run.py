"""The MLflow record of a run: one experiment, a run per stage, parameters, tags, and the export."""

import json
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from urllib.request import urlopen

import pytest

from muomni.observe.metric_names import recorder_metrics, recorder_name
from muomni.observe.tracking.facts import flatten, parameters
from muomni.observe.tracking.store import Store
from tests.observe.mlflow_runs import Start, client, empty_mlflow_store, losses, run_of
from tests.observe.mlflow_server import mlflow_server

DATASET = {"name": "text", "digest": "d" * 64, "source": "/data/text", "num_samples": 8}
CONFIG: dict[str, Any] = {
    "preset": "nano",
    "precision": "auto",
    "optim": {"lr": 0.1, "lr_scales": {"talker.*": 0.05}},
    "training": {"max_steps": None},
    "data": {"root": "/data/corpus", "num_workers": "auto"},
    "resolved": {
        "precision": "bf16", "num_steps": 40, "num_workers": 3, "ranks": 8, "git": "v1-2-gabc123-dirty",
        "datasets": [{**DATASET, "split": "train"}, {**DATASET, "split": "val"}],
    },
}  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder beside an SQLite store."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mlflow.db").write_bytes(empty_mlflow_store())
    return tmp_path / "runs" / "first"


def _record(run: Path, stage: str = "codec", **info: Any) -> Any:
    """The MLflow run of a start that logged one step."""
    start = Start(run, stage, **info)
    start.log(start.info.step + 1)
    start.close()
    return run_of(run, stage)


def test_a_run_links_to_its_losses_in_one_chart(run: Path) -> None:
    found = _record(run)
    note = found.data.tags["mlflow.note.content"]
    address = re.fullmatch(r"\[Loss of [a-z ]+\]\(#/metric\?(\S+)\)", note)
    assert address is not None
    query = {name: value for name, (value,) in parse_qs(address[1]).items()}
    assert json.loads(query["runs"]) == [found.info.run_id]
    assert json.loads(query["plot_metric_keys"]) == ["loss/train", "loss/val"]
    client(run).set_tag(found.info.run_id, "mlflow.note.content", "mine")
    assert _record(run, step=1).data.tags["mlflow.note.content"] == "mine"


def test_stages_are_children_of_one_run_in_one_experiment(run: Path) -> None:
    stages = [_record(run, stage) for stage in ("codec", "talker")]
    pipeline = run_of(run, "")
    assert [each.info.run_name for each in (pipeline, *stages)] == ["first", "codec", "talker"]
    assert {each.data.tags["mlflow.parentRunId"] for each in stages} == {pipeline.info.run_id}
    assert client(run).get_experiment(pipeline.info.experiment_id).name == "first"
    assert {each.info.experiment_id for each in stages} == {pipeline.info.experiment_id}
    assert pipeline.info.status == "FINISHED"
    assert pipeline.data.tags["mlflow.source.name"] == sys.argv[0]
    other = _record(run, config={"training": {"experiment": "mine"}})
    assert client(run).get_experiment(other.info.experiment_id).name == "mine"


def test_parameters_tags_and_datasets_are_those_of_the_start(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    found = _record(run, config=CONFIG)
    params, tags = found.data.params, found.data.tags
    assert (params["precision"], params["training.max_steps"]) == ("bf16", "40")
    assert params["data.num_workers"] == "3"
    assert params["optim.lr_scales"] == "{'talker.*': 0.05}"  # MLflow rejects a key `talker.*`
    assert tags["git_dirty"] == "true" and tags["mlflow.source.git.commit"] == "abc123"
    expected = {
        "stage": "codec",
        "preset": "nano",
        "data": "corpus",
        "ranks": "8",
        "slurm_job": "17",
    }
    assert expected.items() <= tags.items()
    assert Path(sys.argv[0]).name in tags["command"] and {"host", "user"} <= tags.keys()
    inputs = {each.dataset.name: each.tags[0].value for each in found.inputs.dataset_inputs}
    assert inputs == {"text/train": "train", "text/val": "val"}


def test_later_starts_add_the_parameters_that_changed(run: Path) -> None:
    for step, lr in enumerate((0.1, 0.2, 0.2, 0.1)):
        found = _record(run, step=step, config={"optim": {"lr": lr, "beta": 0.9}})
    assert found.data.params == {
        "optim.lr": "0.1", "optim.beta": "0.9", "start_2/optim.lr": "0.2", "start_4/optim.lr": "0.1",
    }  # fmt: skip
    assert found.data.tags["starts"] == "4"


def test_a_fork_has_a_run_of_its_own_that_names_its_parent(run: Path) -> None:
    parent = _record(run)
    checkpoint = str(run / "codec" / "checkpoints" / "step_00000001")
    elsewhere = _record(run.parent / "fork", step=1, resume=checkpoint)
    tags = {"forked_from": checkpoint, "forked_from_run": parent.info.run_id}
    assert tags.items() <= elsewhere.data.tags.items()
    started = Start(run)
    started.log(2)
    started.die()
    here = _record(run, step=1, resume=checkpoint)
    assert tags.items() <= here.data.tags.items() and here.info.run_id != parent.info.run_id
    assert [step for step, _ in losses(run)] == [2]  # of the file that the start has emptied
    assert client(run).get_run(parent.info.run_id).info.status == "KILLED"


def _export(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (folder / name).write_text(name)
    (folder / "export.json").write_text(json.dumps({"step": 7}))


@pytest.mark.parametrize("name", [None, "omni"])
def test_an_export_is_a_model_and_registered_on_request(name: str | None, run: Path) -> None:
    _export(run / "codec" / "export")
    for step in range(2):  # once, although two starts finish
        found = _record(run, step=step, config={"training": {"register_model": name}})
    (output,) = found.outputs.model_outputs
    model = client(run).get_logged_model(output.model_id)
    assert output.step == 7 and model.tags["export"] == str(run / "codec" / "export")
    files = {path.name for path in (run.parent / "mlartifacts").rglob("models/*/artifacts/*")}
    assert files == {"config.json", "export.json"} | ({"model.safetensors"} if name else set())
    versions = client(run).search_model_versions()
    assert [(each.name, each.run_id) for each in versions] == (
        [("omni", found.info.run_id)] if name else []
    )


def test_artifacts_survive_a_move_of_the_store(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    note = tmp_path / "note.txt"
    note.write_text("hello")
    start = Start(run)
    start.mlflow.artifact(note, "samples/text")
    start.close()
    run_id = run_of(run).info.run_id
    run.parent.rename(tmp_path / "moved")
    with mlflow_server(tmp_path / "moved", monkeypatch) as (url, _):
        page = f"{url}/get-artifact?path=samples/text/note.txt&run_uuid={run_id}"
        with urlopen(page) as answer:
            assert answer.read() == b"hello"


def test_the_link_opens_the_metrics_of_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _record(run)
    page = f"#/experiments/{found.info.experiment_id}/runs/{found.info.run_id}/model-metrics"
    page += "?workflowType=machine_learning"
    command = f"cd {run.parent} && mlflow ui --workers 1"
    assert Store(run).link(found) == f"http://127.0.0.1:5000/{page} after: {command}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://user:secret@host:80/sub/")
    assert Store(run).link(found) == f"http://host:80/sub/{page}"


def test_the_loss_is_the_first_group() -> None:
    names = {
        ("train", "loss"): "loss/train",
        ("val", "val/loss"): "loss/val",
        ("val", "val/cer"): "loss/val_cer",
        ("train", "perplexity"): "metric/train_perplexity",
        ("val", "val/image_swap_gap"): "metric/val_image_swap_gap",
        ("train", "lr"): "optim/lr",
        ("train", "audio_s_per_s"): "speed/audio_s_per_s",
        ("train", "mfu"): "speed/mfu",
        ("train", "images_seen"): "samples/images_seen",
        ("train", "moe/entropy"): "moe/entropy",
        ("val", "val/moe/z_loss"): "moe/val_z_loss",
        ("train", "time/forward_s"): "time/forward_s",
    }
    assert {key: recorder_name(*key) for key in names} == names  # type: ignore[arg-type]
    assert min(name.partition("/")[0] for name in names.values()) == "loss"
    assert list(recorder_metrics("train", {"loss": 1.0, "time/forward_percent": 5.0, "lr": 2.0})) == [
        "optim/lr", "loss/train",
    ]  # fmt: skip


def test_parameters_are_flat() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": [2]}) == {
        "a.b": 1,
        "a.c.d": None,
        "e": [2],
    }
    assert parameters({"precision": "auto"}) == {"precision": "auto"}
