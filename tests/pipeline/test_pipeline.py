"""The pipeline: skipped, restarted, and failed stages, arguments, and reports. Training is simulated."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from muomni.cli.pipeline import chosen_stages
from muomni.config.arguments import arguments_for
from muomni.config.registry import STAGES
from muomni.config.run import RunConfig
from muomni.data.shards.manifest import Manifest
from muomni.data.text.tokenizer import Tokenizer
from muomni.errors import ConfigError, MachineError
from muomni.pipeline import runner
from muomni.pipeline.local import RunningRanks, count_ranks, rank_environment, train_argv
from muomni.pipeline.state import stage_state
from tests.corpora import write_text_dataset, write_tokenizer
from tests.pipeline.fake_stages import (
    HANDLER,
    RANK,
    config_of,
    launcher_of,
    run_main,
    use_fake_stages,
)

ROOT = Path(__file__).resolve().parents[2]


def publish(
    run: Path, stage: str, data: Path, weights: bytes = b"first", upstream: tuple[str, ...] = ()
) -> None:
    """Write the folder of a finished stage like the training loop, with the tokenizer of `data`."""
    export = run / stage / "export"
    export.mkdir(parents=True, exist_ok=True)
    digests = {name: digest_of(run, name) for name in upstream}
    files = {
        "model.safetensors": weights,
        "config.json": b"{}",
        "tokenizer.model": (data / "tokenizer.model").read_bytes(),
    }
    for name, content in files.items():
        (export / name).write_bytes(content)
    manifest = Manifest.load(data / "text")
    manifest_of_export: dict[str, Any] = {
        "stage": stage,
        "step": 7,
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
        "config": config_of(stage, data).model_dump(mode="json"),
        "data": {"tasks": ["text"], "fingerprint": f"{manifest.name}:{manifest.fingerprint}"},
        "upstream": digests,
    }
    (export / "export.json").write_text(json.dumps(manifest_of_export))
    (export / "metrics.json").write_text(json.dumps({"val/loss": 1.5}))
    (run / stage / "config.yaml").write_text(
        json.dumps({"resolved": {"upstream_digests": digests}})
    )


def digest_of(run: Path, stage: str) -> str:
    content = json.loads((run / stage / "export" / "export.json").read_text())
    return content["sha256"]["model.safetensors"]


def state(run: Path, stage: str, config: RunConfig) -> str:
    return stage_state(run, stage, config)[0]


def test_a_stage_is_open_after_its_config_or_export_changes(
    text_data: Path, tmp_path: Path
) -> None:
    config = config_of("codec", text_data)
    assert state(tmp_path, "codec", config) == "open"
    publish(tmp_path, "codec", text_data)
    assert Tokenizer.load(text_data / "tokenizer.model").vocab_size == 330
    assert state(tmp_path, "codec", config) == "finished"
    changed = stage_state(tmp_path, "codec", config_of("codec", text_data, lr=0.5))
    assert changed == ("open", "because optim.lr changed")
    training = config.training.model_copy(update={"experiment": "mine", "recorders": ()})
    tracked = config.model_copy(update={"training": training})
    assert state(tmp_path, "codec", tracked) == "finished"
    weights = tmp_path / "codec" / "export" / "model.safetensors"
    weights.write_bytes(b"damaged")
    assert state(tmp_path, "codec", config) == "open"


def test_a_stage_is_open_after_its_data_or_tokenizer_changes(
    text_data: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    write_text_dataset(root / "text")
    write_tokenizer(root / "tokenizer.model")
    publish(tmp_path, "codec", root)
    config = config_of("codec", root)
    assert state(tmp_path, "codec", config) == "finished"
    write_tokenizer(root / "tokenizer.model", vocab_size=320)
    assert state(tmp_path, "codec", config) == "open"
    write_tokenizer(root / "tokenizer.model")
    assert state(tmp_path, "codec", config) == "finished"
    write_text_dataset(root / "more")
    assert state(tmp_path, "codec", config) == "open"


def test_a_stage_starts_over_after_its_upstream_was_retrained(
    text_data: Path, tmp_path: Path
) -> None:
    config = config_of("talker", text_data)
    publish(tmp_path, "codec", text_data)
    publish(tmp_path, "talker", text_data, upstream=("codec",))
    assert state(tmp_path, "talker", config) == "finished"
    publish(tmp_path, "codec", text_data, weights=b"second")
    assert state(tmp_path, "talker", config) == "outdated"
    # Restarted with the new codec, then interrupted: it resumes and does not start over twice.
    restarted = {"resolved": {"upstream_digests": {"codec": digest_of(tmp_path, "codec")}}}
    (tmp_path / "talker" / "config.yaml").write_text(json.dumps(restarted))
    assert state(tmp_path, "talker", config) == "open"


def test_a_moved_run_and_its_moved_data_stay_finished(
    text_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "data"
    shutil.copytree(text_data, root)
    publish(tmp_path / "run", "codec", root)
    publish(tmp_path / "run", "talker", root, upstream=("codec",))
    for name in ("run", "data"):
        shutil.move(tmp_path / name, tmp_path / f"moved {name}")
    monkeypatch.chdir(tmp_path)
    for stage in ("codec", "talker"):
        config = config_of(stage, Path("moved data"))
        assert state(Path("moved run"), stage, config) == "finished"


def test_values_of_options_are_not_taken_for_arguments_of_a_stage() -> None:
    extra = ["--config", "sft.lr=1.yaml", "sft.optim.lr=1", "codec.seed=3", "data.root=talker.x"]
    assert arguments_for("sft", extra) == [*extra[:2], "optim.lr=1", "data.root=talker.x"]
    assert arguments_for("talker", [*extra, "--resume", "codec.a=b", "sft.yaml"]) == [
        *extra[:2], "data.root=talker.x", "--resume", "codec.a=b", "sft.yaml"
    ]  # fmt: skip


def test_stages_are_in_dependency_order_and_unknown_ones_are_rejected() -> None:
    assert chosen_stages(None) == list(STAGES)
    assert chosen_stages("sft, codec") == ["codec", "sft"]
    with pytest.raises(ConfigError, match=r"unknown stage 'coder' \(did you mean 'codec'\?\)"):
        chosen_stages("coder")


def test_overrides_go_to_all_stages_or_to_one() -> None:
    extra = ["seed=3", "codec.optim.lr=1", "--precision", "bf16"]
    assert arguments_for("codec", extra) == ["seed=3", "optim.lr=1", "--precision", "bf16"]
    assert arguments_for("sft", extra) == ["seed=3", "--precision", "bf16"]


def call(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / "launch" / "pipeline.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_an_error_in_a_late_stage_is_reported_before_the_first_one(
    text_data: Path, tmp_path: Path
) -> None:
    common = ("--data", str(text_data), "--run", str(tmp_path / "run"))
    done = call(*common, "--", "sft.optim.lrr=1")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pipeline: sft: unknown key 'optim.lrr'" in done.stderr and "did you mean" in done.stderr
    assert not (tmp_path / "run").exists()
    assert "unknown option --rnk" in call(*common, "--rnk", "2").stderr


def test_a_dry_run_prints_states_and_commands(text_data: Path, tmp_path: Path) -> None:
    publish(tmp_path, "codec", text_data)
    publish(tmp_path, "talker", text_data, upstream=("codec",))
    publish(tmp_path, "codec", text_data, weights=b"second")
    common = ("--data", str(text_data), "--run", str(tmp_path), "--stages", "thinker,codec,talker")
    done = call(*common, "--ranks", "2", "--dry-run", "--", "thinker.seed=0")
    lines = done.stdout.splitlines()
    assert [line for line in lines if not line.startswith("  ")] == [
        "thinker: open",
        "codec: finished",
        "talker: outdated (because codec was retrained)",
    ]
    assert "--num_gpus 2" in lines[1] and lines[1].endswith(f"--run {tmp_path} seed=0")
    assert lines[4].endswith(f"--run {tmp_path} --resume never")
    assert not (tmp_path / "thinker").exists()


def test_resume_never_skips_nothing(text_data: Path, tmp_path: Path) -> None:
    publish(tmp_path, "codec", text_data)
    common = ("--data", str(text_data), "--run", str(tmp_path), "--stages", "codec", "--ranks", "1")
    assert call(*common, "--dry-run").stdout == "codec: finished\n"
    done = call(*common, "--dry-run", "--", "--resume", "never")
    assert done.stdout.startswith("codec: open (because of --resume)")


def test_the_first_failure_stops_the_rest_and_names_its_log(
    text_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    use_fake_stages(
        monkeypatch, {"codec": "print('no'); raise SystemExit(3)", "talker": "raise SystemExit(9)"}
    )
    ended: list[tuple[Path, str]] = []
    monkeypatch.setattr(runner, "end_killed", lambda *which: ended.append(which))
    common = ("--data", str(text_data), "--run", str(tmp_path), "--ranks", "1")
    assert run_main(*common, "--stages", "codec,talker") == 3
    assert ended == [(tmp_path, "codec")]  # in MLflow, if its process could not
    log = tmp_path / "codec" / "train.log"
    captured = capfd.readouterr()
    assert (
        f"pipeline: stage codec failed with exit code 3; fix the error at the end of {log}"
        in captured.err
    )
    assert "no\n" in captured.out and log.read_text().endswith("no\n")
    assert not (tmp_path / "talker").exists()


def test_output_ends_with_a_table_and_json(
    text_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    publish(tmp_path, "thinker", text_data)
    publish(tmp_path, "codec", text_data)
    (tmp_path / "codec" / "config.yaml").write_text("resolved: {upstream_digests: {thinker: old}}")
    codec = tmp_path / "codec" / "export" / "export.json"
    program = f"from pathlib import Path; path = Path({str(codec)!r}); "
    program += "path.write_text(path.read_text().replace('7', '8', 1))"
    use_fake_stages(monkeypatch, {"codec": program})
    common = ("--data", str(text_data), "--run", str(tmp_path), "--ranks", "1")
    assert run_main(*common, "--stages", "thinker,codec") == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-5].split()[-2:] == ["steps", "validation"]
    assert lines[-2].split()[:2] == ["next", "muomni"]
    assert lines[-4].split() == ["thinker", "finished", "before", "0:00", "7", "loss", "1.5"]
    stages = json.loads(lines[-1])["stages"]
    assert stages["codec"]["status"] == "trained"
    assert stages["thinker"]["metrics"] == {"val/loss": 1.5}


def test_a_stage_with_nothing_to_train_is_kept(
    text_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    publish(tmp_path, "codec", text_data)
    use_fake_stages(monkeypatch, {"codec": "print('codec is finished')"})
    common = ("--data", str(text_data), "--run", str(tmp_path), "--ranks", "1", "--stages", "codec")
    assert run_main(*common, "--", "optim.lr=0.5") == 0
    printed = capfd.readouterr().out
    assert "codec: nothing to train, export kept; to retrain it" in printed
    assert "because optim.lr changed" in printed
    assert json.loads(printed.splitlines()[-1])["stages"]["codec"]["status"] == "kept"


def codes_when_stopped(log: Path, rank: str, number: signal.Signals) -> tuple[int, str]:
    """Signal a process that runs fake ranks; returns its exit code and output."""
    program = (
        "import os, sys, time; from pathlib import Path\n"
        "from muomni.pipeline.local import RunningRanks, on_stop_signal\n"
        f"command = [sys.executable, '-c', {launcher_of(rank)!r}]\n"
        f"ranks = RunningRanks(command, Path({str(log)!r}), dict(os.environ))\n"
        "with on_stop_signal(ranks.stop):\n"
        "    while ranks.poll() is None: time.sleep(0.05)\n"
        "sys.exit(ranks.poll())"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(number)
        return process.wait(timeout=30), process.stdout.read()


@pytest.mark.parametrize("handler", [HANDLER, ""])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_is_forwarded_and_the_exit_code_returned(
    tmp_path: Path, number: signal.Signals, handler: str
) -> None:
    code, printed = codes_when_stopped(tmp_path / "log", RANK.format(handler=handler), number)
    assert code == 85
    assert f"{number.name}: the ranks save and stop" in printed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_without_a_log_a_signal_is_forwarded_to_ranks_that_start_later(
    number: signal.Signals,
) -> None:
    late = launcher_of(RANK.format(handler=HANDLER)).replace(
        "import", "import time; time.sleep(1); import", 1
    )
    program = (
        "import os, sys; from muomni.pipeline import local\n"
        "print('up', flush=True)\n"
        f"sys.exit(local.run_ranks([sys.executable, '-c', {late!r}], dict(os.environ)))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        time.sleep(0.3)
        process.send_signal(number)
        assert process.wait(timeout=30) == 85


def test_a_log_keeps_all_attempts(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    for word in ("one", "two"):
        ranks = RunningRanks([sys.executable, "-c", f"print({word!r})"], log, dict(os.environ))
        while ranks.poll() is None:
            time.sleep(0.05)
        assert ranks.poll() == 0
    lines = log.read_text().splitlines()
    assert [line for line in lines if not line.startswith("# ")] == ["one", "two"]
    assert lines[0].startswith(f"# {time.strftime('%Y')}")


def test_ranks_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("muomni.pipeline.local.num_cores", lambda: 8)
    assert rank_environment(4)["OMP_NUM_THREADS"] == "2"
    assert rank_environment(2, num_sharing=8)["OMP_NUM_THREADS"] == "1"


def test_ranks_get_only_visible_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muomni.pipeline.local.num_gpus", lambda: 4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert rank_environment(2)["MUOMNI_GPUS"] == "4,5"
    assert rank_environment(2, first_gpu=2)["MUOMNI_GPUS"] == "6,7"
    with pytest.raises(ConfigError, match="8 ranks need one GPU each, but 4 are visible"):
        rank_environment(8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert rank_environment(2, first_gpu=2)["MUOMNI_GPUS"] == "2,3"


def test_unusable_gpus_are_not_replaced_by_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(MachineError, match=r"there are GPUs \(SLURM_GPUS_ON_NODE=8\), but"):
        count_ranks()


def test_missing_deepspeed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/bin/python")
    with pytest.raises(MachineError, match=r"/nowhere/bin/deepspeed is missing; .*make install"):
        train_argv(1, [])


def test_slurm_submits_a_chain_of_jobs(tmp_path: Path) -> None:
    common = ("--data", "d", "--run", str(tmp_path), "--stages", "codec,talker", "--slurm")
    done = call(*common, "--dry-run", "--sbatch", "--partition=gpu", "--", "seed=3")
    commands = done.stdout.splitlines()
    assert commands[0].startswith("sbatch --parsable --job-name=muomni-codec")
    assert "--partition=gpu" in commands[1] and commands[1].endswith("seed=3")
    assert "--dependency=afterok:codec" in commands[1]
