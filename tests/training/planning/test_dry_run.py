"""`launch/train.py --dry-run`: memory, units, and FLOPs, for this machine and for others."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from muomni.cli.train import train
from muomni.config.arguments import parse_train, resolve_train
from muomni.distributed import compiler
from muomni.distributed.discovery import discover
from muomni.errors import ConfigError
from muomni.models.language.thinker import Thinker
from muomni.training.engine.offload import Offload
from muomni.training.planning.dry_run import Device, fits_device, read_step
from muomni.training.planning.memory_plan import MemoryPlan
from muomni.training.planning.step_trace import LOGITS, StepTrace, trace_step
from muomni.training.session import Request, prepare
from tests.training.runs import TINY_THINKER, thinker_config

GIB = 2**30
RENDEZVOUS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


def launch(data: Path, *flags: str, environ: dict[str, str] | None = None) -> dict[str, Any]:
    """The result of `launch/train.py` with a small Thinker in this process."""
    sizes = [f"model.{name}={value}" for name, value in TINY_THINKER.items()]
    flags_of_run = [
        "--stage", "thinker", "--data", str(data), *sizes, "batch.seq_len=64",
        "batch.global_tokens=4096", "training.max_steps=20", *flags,
    ]  # fmt: skip
    arguments = parse_train(flags_of_run)
    return train(arguments, resolve_train(arguments), discover(environ or {}))


def dry_run(data: Path, *flags: str) -> dict[str, Any]:
    """The metrics of a dry run by one process."""
    return launch(data, "--dry-run", *flags)


def test_state_is_sharded_by_zero_stage(
    text_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = dry_run(text_data, "--gpus", "32", "--gpu-gib", "4", "--precision", "bf16")
    printed = capsys.readouterr().out
    assert "memory per GPU in MiB, 32 in total, bf16 (a GPU has 4,096 MiB)" in printed
    assert json.loads(json.dumps(found)) == found
    full, *sharded = found["memory"]
    names = [(plan["zero_stage"], plan["offload"]) for plan in sharded]
    both = "optimizer and parameters"
    assert names == [(1, ""), (2, ""), (2, "optimizer"), (3, ""), (3, both)]
    num = found["parameters"]
    assert full["optimizer_state_bytes"] == 12 * num
    for plan in sharded:
        # Page-locked fp32 weights take up to twice their size.
        most = 16 if plan["offload"] else 12
        assert 12 * num / 32 <= plan["optimizer_state_bytes"] <= 1.05 * most * num / 32
        assert plan["fits"] and plan["device_bytes"] == 4 * GIB
        assert bool(plan["host_bytes"]) == bool(plan["offload"])
    assert found["ranks"] == 32 and found["micro_batches_per_rank"] == 1
    assert "4,096 tokens in 64 sequences per step on 32 ranks x 1 micro-batch\n" in printed
    one = dry_run(text_data, "--gpus", "1", "--precision", "bf16")
    assert one["memory"][0]["fits"] is None  # the memory of a GPU is not known here
    assert one["tokens_per_step"] == pytest.approx(found["tokens_per_step"], rel=0.2)
    assert one["flops_per_step"] == pytest.approx(found["flops_per_step"], rel=0.2)
    small = dry_run(text_data, "--gpus", "1", "--gpu-gib", "0.0001")
    assert [plan["fits"] for plan in small["memory"]] == [False] * 6


@pytest.mark.parametrize("num_gpus", [1, 3, 6, 8, 12, 24, 48, 64])
def test_a_plan_exists_for_any_number_of_gpus(
    num_gpus: int, text_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("batch.global_tokens=640", "batch.micro_sequences=2")
    found = dry_run(text_data, "--gpus", str(num_gpus), *flags)
    printed = capsys.readouterr().out
    assert found["ranks"] == min(num_gpus, 10)
    assert ("trains on 10 of" in printed) == (num_gpus > 10)
    assert ("padding" in printed) == (num_gpus in (3, 6, 8))


def test_surplus_ranks_end_at_once_and_the_others_form_a_smaller_job(
    text_data: Path, tmp_path: Path
) -> None:
    variables = {"WORLD_SIZE": "4", **RENDEZVOUS}
    flags = ("batch.global_tokens=128", "--dry-run", "--run", str(tmp_path))
    first = {"RANK": "1", "LOCAL_RANK": "1", **variables}
    assert launch(text_data, *flags, environ=first)["ranks"] == 2
    with pytest.raises(SystemExit) as end:
        launch(text_data, *flags, environ={"RANK": "3", "LOCAL_RANK": "3", **variables})
    assert end.value.code == 0


def test_a_plan_for_gpus_ignores_the_hardware_of_this_machine(
    text_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ("--precision", "bf16", "training.attention=varlen", "training.compile=true")
    monkeypatch.setattr(compiler, "missing_for_compiling", lambda _: "a compiler")
    by_documents = dry_run(text_data, "--gpu-gib", "80", *flags)["memory"][0]
    by_mask = dry_run(text_data, "--gpu-gib", "80", *flags[:2])["memory"][0]
    assert by_documents["optimizer_state_bytes"] == by_mask["optimizer_state_bytes"]
    with pytest.raises(ConfigError, match="this run is on cpu"):
        dry_run(text_data, *flags[:3])
    with pytest.raises(ConfigError, match="needs a compiler"):
        dry_run(text_data, *flags[:2], flags[3])
    # What no GPU supports is rejected in a plan, too.
    with pytest.raises(ConfigError, match="bf16 or fp16, not fp32"):
        dry_run(text_data, "--gpu-gib", "80", "--precision", "fp32", flags[2])


def test_check_memory_rejects_a_run_that_does_not_fit(
    text_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert dry_run(text_data, "--gpu-gib", "1", "--check-memory")["memory"][1]["fits"]
    with pytest.raises(
        ConfigError, match=r"a rank needs \d+ MiB, mostly for .*, but its cuda has 0 MiB"
    ):
        dry_run(text_data, "--gpu-gib", "0.0001", "--check-memory")
    assert not dry_run(text_data, "--gpu-gib", "0.0001")["memory"][1]["fits"]
    with pytest.raises(ConfigError, match="add --gpu-gib"):
        dry_run(text_data, "--gpus", "1", "--check-memory")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=2**20))
    refusals = []
    for rank in ("0", "1"):  # which start with different samples
        environ = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", **RENDEZVOUS}
        with pytest.raises(ConfigError, match="has 0 MiB") as refusal:
            launch(text_data, "--check-memory", "--run", str(tmp_path), environ=environ)
        refusals.append(str(refusal.value))
    assert refusals[0] == refusals[1]
    assert not list(tmp_path.iterdir())


def test_ranks_on_a_cpu_share_its_memory(text_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    total = psutil.virtual_memory().total
    assert dry_run(text_data)["memory"][0]["device_bytes"] == total
    monkeypatch.setenv("LOCAL_SIZE", "4")
    assert dry_run(text_data)["memory"][0]["device_bytes"] == total // 4


def test_gpus_needs_dry_run(text_data: Path) -> None:
    with pytest.raises(ConfigError, match="add --dry-run, or remove them"):
        launch(text_data, "--gpus", "2")
    with pytest.raises(ConfigError, match="--gpus: '0' is not an integer from 1"):
        dry_run(text_data, "--gpus", "0")
    with pytest.raises(ConfigError, match="--gpu-gib: '-8' is not a number above 0"):
        dry_run(text_data, "--gpus", "2", "--gpu-gib=-8")


def write_json(path: Path, content: dict[str, Any]) -> str:
    path.write_text(json.dumps(content))
    return str(path)


def test_the_sums_of_bf16_gradients_need_memory(text_data: Path, tmp_path: Path) -> None:
    peaks = []
    for name in ("fp32", "bf16"):
        content = {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": name}}
        engine = write_json(tmp_path / f"{name}.json", content)
        flags = (
            "--precision",
            "bf16",
            "--deepspeed_config",
            engine,
            "--gpus",
            "16",
            "batch.micro_sequences=2",
        )
        (plan,) = (p for p in dry_run(text_data, *flags)["memory"] if p["zero_stage"] == 1)
        peaks.append(plan["parts_bytes"]["gradients"])
    assert 1.5 * peaks[1] < peaks[0] <= 2 * peaks[1]


def test_offload_has_a_row_and_uses_the_same_memory_on_a_cpu(
    text_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = {"stage": 1, "offload_optimizer": {"device": "cpu"}}
    engine = write_json(tmp_path / "offload.json", {"zero_optimization": section})
    found = dry_run(text_data, "--deepspeed_config", engine)["memory"]
    assert [(plan["zero_stage"], plan["offload"]) for plan in found] == [
        (0, ""), (1, ""), (1, "optimizer"), (2, ""), (3, ""),
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert re.search(r"^ *1\* .* optimizer$", printed, re.MULTILINE)
    assert "on a CPU, part of the same memory" in printed


def test_device_and_host_must_both_be_large_enough() -> None:
    plan = MemoryPlan(2, {"update": {"parameters": 60}}, Offload(optimizer=True), {"moments": 50})
    assert fits_device(plan, Device("cuda", None)) is None
    assert fits_device(plan, Device("cuda", 60)) and fits_device(plan, Device("cuda", 60, 50))
    assert not fits_device(plan, Device("cuda", 59, 50))
    assert not fits_device(plan, Device("cuda", 60, 49))
    assert fits_device(plan, Device("cpu", 110)) and not fits_device(plan, Device("cpu", 109))


def trace(data: Path, changes: dict[str, Any]) -> tuple[StepTrace, Any, list[dict[str, Any]]]:
    config = thinker_config(data, changes)
    session = prepare(Request(config, Path(), Path(), {}, "never"), discover({}))
    batches = read_step(session)
    return trace_step(session.stage, batches, "fp32", 1), session.stage.model_config(), batches


def test_flops_are_those_of_the_formulas(text_data: Path) -> None:
    """The head runs on predicted positions only, attention over full sequences."""
    found, sizes, batches = trace(
        text_data, {"batch": {"global_tokens": 192, "micro_sequences": 3}}
    )
    num_predicted = int((batches[0]["labels"] >= 0).sum())
    costs = Thinker(sizes).flops()
    stack = costs["positions"] * (3 * 64) + costs["pairs"] * (3 * 64**2)
    assert found.flops == (stack + costs["predictions"] * num_predicted).model()


def test_logits_do_not_grow_with_the_batch(text_data: Path) -> None:
    def largest(batch_size: int) -> tuple[int, Any]:
        changes = {"batch": {"global_tokens": 64 * batch_size, "micro_sequences": batch_size}}
        found, sizes, _ = trace(text_data, changes)
        return max(stretch.live.get(LOGITS, 0) for stretch in found.stretches), sizes

    (half, sizes), (full, _) = largest(24), largest(48)  # more than a chunk of 1,024 positions
    assert half > 1024 * 4 * sizes.vocab_size
    # Hidden states and their gradients grow, but not the logits.
    assert full - half < 24 * 64 * 4 * sizes.vocab_size
