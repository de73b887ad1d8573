"""A full disk on one rank stops all with one sentence; earlier checkpoints remain, and the run resumes."""

import errno
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from muomni.checkpoint import export, file_list, store
from muomni.errors import StorageError
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train


def _train_on_full_disk(config: Any, run: Path, rank: int, file: str) -> tuple[str, list[str]]:
    """Fail when `rank` writes `file` in step 4; returns the error and the names of the checkpoints."""
    save_tensors, save_export = torch.save, export.save_file
    is_failing = torch.distributed.get_rank() == rank

    def save(content: Any, opened: Any) -> None:
        if is_failing and "step_00000004" in opened.name and file in opened.name:
            raise OSError(errno.ENOSPC, "No space left on device", opened.name)
        save_tensors(content, opened)

    def save_file(tensors: Any, path: Path) -> None:
        if is_failing and file == "export":
            raise SafetensorError("No space left on device")
        save_export(tensors, path)

    torch.save, export.save_file = save, save_file  # type: ignore[assignment]
    try:
        train(config, run)
    except StorageError as error:
        root = run / "thinker" / "checkpoints"
        return str(error), sorted(path.name for path in root.iterdir() if path.is_dir())
    finally:
        torch.save, export.save_file = save_tensors, save_export
    return "", []


@pytest.mark.parametrize("num_bytes", [0, 10, 1000, 100_000])
def test_a_write_that_fails_anywhere_is_an_os_error(num_bytes: int, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            store._save({"a": torch.zeros(10_000), "b": torch.zeros(100_000)}, tmp_path / "x.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _train_without_recovery_script(config: Any, run: Path) -> tuple[str, bool]:
    """Fail in a file that only rank 0 writes, before a barrier; returns the error and whether it is local."""
    from deepspeed.runtime import engine

    copy = engine.copyfile

    def fail(source: str, target: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", target)

    engine.copyfile = fail
    try:
        train(config, run)
    except StorageError as error:
        return str(error), error.is_rank_local
    finally:
        engine.copyfile = copy
    return "", False


def test_a_rank_that_leaves_a_save_of_deepspeed_does_not_wait_for_the_others(
    text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    config = thinker_config(text_data, {"training": {"max_steps": 2}})
    [(error, is_local)] = one_rank.run(_train_without_recovery_script, config=config, run=tmp_path)
    assert is_local and error.startswith(f"cannot write checkpoint {tmp_path}/thinker/")
    assert "No space left on device; what was saved before" in error
    assert list((tmp_path / "thinker" / "checkpoints").glob(".step*")) == []


@pytest.mark.parametrize(
    ("rank", "file"), [(1, "optim_states"), (0, "model_states"), (1, "rng_rank"), (0, "export")]
)
def test_a_full_disk_stops_all_ranks_and_the_run_resumes(
    rank: int, file: str, text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = thinker_config(text_data, {"training": {"max_steps": 6, "save_every": 2}})
    failed = two_ranks.run(_train_on_full_disk, config=config, run=tmp_path, rank=rank, file=file)
    errors, checkpoints = zip(*failed, strict=True)
    what = "export" if file == "export" else "checkpoint"
    assert errors[0] == errors[1]
    assert errors[0].startswith(f"cannot write {what} {tmp_path}/thinker/")
    assert (
        f"No space left on device on rank {rank}; what was saved before is unchanged" in errors[0]
    )
    last = 6 if file == "export" else 2
    assert checkpoints[0][-1] == file_list.step_folder(Path(), last).name
    assert not any(name.endswith(".tmp") for name in checkpoints[0])
    assert two_ranks.run(train, config=config, run=tmp_path)[0]["step"] == 6
