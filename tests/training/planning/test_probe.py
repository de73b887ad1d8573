"""The probe finds the largest micro-batch within a memory limit."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from muomni.cli.main import main
from muomni.distributed.discovery import discover
from muomni.errors import ConfigError
from muomni.training.planning.probe import Probed, largest_fitting, probe
from muomni.training.session import Request, prepare
from tests.ranks import RankPool
from tests.training.runs import TINY_THINKER, thinker_config
from tests.training.stages.curves import stage_config

MIB = 2**20


def _probe(config: Any, run: Path, max_bytes: int) -> Probed:
    engine_json = {"zero_optimization": {"stage": 1}}
    return probe(prepare(Request(config, run, run, engine_json, "never"), discover()), max_bytes)


@given(st.integers(0, 300), st.integers(1, 200))
def test_the_search_finds_the_largest_size(largest: int, limit: int) -> None:
    tried: list[int] = []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= largest

    best, found = min(largest, limit), largest_fitting(fits, limit)
    assert best - max(1, best // 16) < found <= best
    assert max(tried) <= limit and len(tried) <= 18


def test_sequences_fit_the_limit_and_one_more_step_does_not(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    config = thinker_config(text_data, {"batch": {"global_tokens": 64 * 64}})
    everything = one_rank.run(_probe, config=config, run=tmp_path, max_bytes=10**12)[0]
    assert (everything.key, everything.value) == ("micro_sequences", 64)
    peaks = {trial.size: trial.peak for trial in everything.trials}
    limit = peaks[16]
    found = one_rank.run(_probe, config=config, run=tmp_path, max_bytes=limit)[0]
    assert 15 <= found.value <= 17  # peaks vary by the documents of the batch
    assert all((t.peak <= limit) == (t.size <= found.value) for t in found.trials)


def test_seconds_hold_for_all_lengths(media_data: Path, tmp_path: Path, one_rank: RankPool) -> None:
    changes = {"batch": {"global_seconds": 40, "micro_seconds": 2}}
    config = stage_config("audio_encoder", media_data, changes)
    everything = one_rank.run(_probe, config=config, run=tmp_path, max_bytes=10**12)[0]
    assert (everything.key, everything.value) == ("micro_seconds", 40)
    longest = max(trial.length for trial in everything.trials)
    peak = max(t.peak for t in everything.trials if t.length == longest and t.size <= 4)
    found = one_rank.run(_probe, config=config, run=tmp_path, max_bytes=peak)[0]
    assert longest / 100 - 1 < found.value < 10
    assert len({trial.length for trial in found.trials}) == 3


def test_a_model_without_any_fitting_size_is_rejected(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    with pytest.raises(ConfigError, match="not even one sequence fits"):
        one_rank.run(_probe, config=thinker_config(text_data), run=tmp_path, max_bytes=1000)


def test_the_command_needs_a_limit_on_a_cpu(
    text_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [f"model.{name}={value}" for name, value in TINY_THINKER.items()]
    argv = ["probe", "--stage", "thinker", "--data", str(text_data), *sizes, "batch.seq_len=64"]
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == ConfigError.exit_code
    assert "give --memory-gib" in capsys.readouterr().err
