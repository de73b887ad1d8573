"""slurm/pipeline.sh on a fake cluster: submitted jobs and their dependencies."""

import re

import pytest

from muomni.config.registry import STAGES
from tests.slurm.conftest import ROOT, FakeCluster, is_in_order

UPSTREAM = {stage: spec.upstream for stage, spec in STAGES.items()}


def submitted(cluster: FakeCluster) -> dict[str, tuple[str, set[str]]]:
    """Command and dependencies (job names) of each submitted job, keyed by name."""
    calls = cluster.calls_of("sbatch")
    names = re.findall(r"--job-name=muomni-([^>]*)", "\n".join(calls))
    jobs = {}
    for name, call in zip(names, calls, strict=True):
        after = re.search(r"--dependency=afterok:([\d:]+)> <--kill-on-invalid-dep=yes", call)
        ids = after.group(1).split(":") if after else []
        jobs[name] = (call, {names[int(number) - 1] for number in ids})
    return jobs


def test_stages_only_wait_for_their_upstream_stages(cluster: FakeCluster) -> None:
    code, output = cluster.run("pipeline.sh", "--data", "d", "--run", "r", "--preset", "tiny")
    assert code == 0, output
    jobs = submitted(cluster)
    assert {stage: jobs[stage][1] for stage in STAGES} == {
        stage: set(upstream) for stage, upstream in UPSTREAM.items()
    }
    for stage in STAGES:
        call = jobs[stage][0]
        assert f"<{ROOT}/slurm/train.sbatch> <--stage> <{stage}> <--preset> <tiny>" in call
        assert f"<--data> <{cluster.folder}/d> <--run> <{cluster.folder}/r>" in call
        assert (cluster.folder / "r" / stage).is_dir()  # for the log
        assert jobs[f"evaluate-{stage}"][1] == set(STAGES)
    assert output.splitlines()[-1] == "evaluate-sft 12"


def test_selected_stages_only_wait_for_each_other(cluster: FakeCluster) -> None:
    stages = ("--stages", "sft,talker", "--no-evaluate")
    cluster.run("pipeline.sh", "--data", "d", "--run", "r", *stages)
    jobs = submitted(cluster)
    assert {name: after for name, (_, after) in jobs.items()} == {
        "talker": set(),
        "sft": {"talker"},
    }


def test_shards_and_tokenizer_come_first(cluster: FakeCluster) -> None:
    corpora = ("--shards", "text --format txt --src t --out d/t", "--shards", "speech --src s")
    more = ("--array", "0-7%2", "--sbatch-shards", "--partition=cpu", "--vocab-size", "400")
    cluster.run("pipeline.sh", "--data", "d", "--run", "r", "--stages", "codec", *corpora, *more)
    jobs = submitted(cluster)
    assert "<--array=0-7%2>" in jobs["shards0"][0] and "<--partition=cpu>" in jobs["shards1"][0]
    assert "shard_array.sbatch> <text> <--format> <txt> <--src> <t>" in jobs["shards0"][0]
    assert jobs["tokenizer"][1] == {"shards0", "shards1"}
    assert f"<tokenizer> <--data> <{cluster.folder}/d> <--vocab-size> <400>" in jobs["tokenizer"][0]
    assert jobs["codec"][1] == {"tokenizer"}


def test_options_and_overrides_reach_their_stage(cluster: FakeCluster) -> None:
    options = ("--sbatch", "--partition=gpu --nodes=2", "--sbatch-sft", "--nodes=4")
    overrides = ("--", "--precision", "bf16", "seed=3", "sft.optim.lr=1e-4")
    cluster.run("pipeline.sh", "--data", "d", "--run", "r", *options, *overrides)
    jobs = submitted(cluster)
    sft, codec = jobs["sft"][0], jobs["codec"][0]
    assert is_in_order(sft, ["<--partition=gpu>", "<--nodes=2>", "<--nodes=4>", "train.sbatch"])
    assert "--nodes=4" not in codec
    assert sft.endswith("<--precision> <bf16> <seed=3> <optim.lr=1e-4>")
    assert codec.endswith("<--precision> <bf16> <seed=3>")
    assert "bf16" not in jobs["evaluate-sft"][0]


def test_dry_run_submits_nothing(cluster: FakeCluster) -> None:
    code, output = cluster.run("pipeline.sh", "--data", "d", "--run", "r", "--dry-run")
    assert code == 0 and output.count("sbatch") > 6
    assert not cluster.calls and not (cluster.folder / "r").exists()


def test_rejected_job_cancels_the_previous_jobs(cluster: FakeCluster) -> None:
    refused = {"FAKE_REFUSED": "muomni-codec"}
    code, output = cluster.run("pipeline.sh", "--data", "d", "--run", "r", **refused)
    assert code == 2
    assert "sbatch rejected codec (see above); the jobs submitted before it were canceled" in output
    assert sorted(cluster.calls[-1].split()) == ["1", "2", "3", "scancel"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--data", "d"), "the following arguments are required: --run"),
        (
            ("--data", "d", "--run", "r", "--stages", "coder"),
            "unknown stage 'coder' (did you mean 'codec'?); stages: think",
        ),
        (
            ("--run", "r", "--sbatch-coder", "-N2"),
            "--sbatch-coder (did you mean '--sbatch-codec'?)",
        ),
        (("--run", "r", "--datta", "d"), "unknown option --datta (did you mean '--data'?)"),
    ],
)
def test_user_error_is_one_sentence(
    cluster: FakeCluster, arguments: tuple[str, ...], sentence: str
) -> None:
    code, output = cluster.run("pipeline.sh", *arguments)
    assert code == 2 and len(output.splitlines()) == 1
    assert output.startswith("muomni pipeline: ") and sentence in output
