"""The loader: same batches for any number of workers, augmentation, and broken samples."""

import itertools
import logging
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from muomni.config.models import Augmentation
from muomni.data.loading.loader import DeviceCopies, Loader, PlannedDataset, to_device
from muomni.data.sampling.plan import Batching, MicroBatch, Plan
from muomni.data.shards.source import Source
from muomni.data.text.ctc_units import CtcUnits
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.base import Batch, View
from muomni.data.views.image_text import ImageTextView
from muomni.data.views.speech import SpeechView
from muomni.data.views.waveform import WaveformView
from muomni.errors import DataError
from tests.corpora import write_dataset
from tests.media_corpora import speech_sample, write_image_dataset, write_speech_dataset
from tests.ranks import RankPool


def _dataset(source: Source, tokenizer: Tokenizer) -> PlannedDataset:
    return PlannedDataset(source, SpeechView(CtcUnits(tokenizer, None), True), seed=3)


def _plan(dataset: PlannedDataset) -> Plan:
    lengths = dataset.view.lengths(dataset.source)
    longest = int(lengths.all().max())
    return Plan(lengths, Batching("bucket", 6 * longest, 3 * longest), dataset.seed)


def _loader(dataset: PlannedDataset, start_step: int, num_workers: int) -> Loader:
    """A loader of rank 1 of 2."""
    batches = _plan(dataset).rank_batches(start_step, rank=1, num_ranks=2)
    return Loader(dataset, batches, num_workers, prefetch=2)


def _first(dataset: PlannedDataset, start_step: int, num_workers: int) -> list[Batch]:
    """The first 20 batches, past the end of an epoch."""
    return list(itertools.islice(_loader(dataset, start_step, num_workers), 20))


def _assert_equal(batches: list[Batch], others: list[Batch]) -> None:
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[key], other[key]) for key in batch)


def test_workers_do_not_change_batches_and_resume_is_exact(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    dataset = _dataset(
        Source([write_speech_dataset(tmp_path / "s", num_train=20)], "train"), tokenizer
    )
    alone = _first(dataset, 0, num_workers=0)
    _assert_equal(_first(dataset, 0, num_workers=2), alone)
    num_before = sum(len(_plan(dataset).rank_step(step, 1, 2)) for step in range(5))
    assert 5 <= num_before < 20
    _assert_equal(_first(dataset, 5, num_workers=0)[: 20 - num_before], alone[num_before:])


def _interrupted_batches(dataset: PlannedDataset, number: int) -> int:
    """Read batches and signal all processes below this one after the second; returns how many came."""
    count = 0
    for _ in itertools.islice(_loader(dataset, 0, num_workers=1), 12):
        count += 1
        if count == 2:
            below = psutil.Process().children(recursive=True)
            assert len(below) >= 2  # the server and its worker
            for process in below:
                process.send_signal(number)
    return count


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_of_launchers_and_terminals_do_not_end_workers(
    number: signal.Signals, tmp_path: Path, tokenizer: Tokenizer, one_rank: RankPool
) -> None:
    source = Source([write_speech_dataset(tmp_path / "s", num_train=20)], "train")
    dataset = _dataset(source, tokenizer)
    assert one_rank.run(_interrupted_batches, dataset=dataset, number=number) == [12]


def test_workers_end_when_their_rank_is_killed() -> None:
    program = Path(__file__).with_name("endless_loader.py")
    with subprocess.Popen([sys.executable, program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "reading\n"
        below = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert len(below) >= 2
    _, alive = psutil.wait_procs(below, timeout=20)
    for left in alive:
        left.kill()
    assert not alive


@pytest.mark.parametrize("kind", ["speech", "waveform", "image"])
def test_augmentation_differs_between_epochs_and_is_off_in_evaluation(
    kind: str, tmp_path: Path, tokenizer: Tokenizer
) -> None:
    """Augmented batches differ between epochs; evaluation batches do not."""
    views: dict[str, View[Any]] = {
        "speech": SpeechView(CtcUnits(tokenizer, None), True),
        "waveform": WaveformView(crop_s=0.2),
        "image": ImageTextView(tokenizer, 32, 24, Augmentation(min_scale=0.5, max_scale=1.0)),
    }
    write = write_image_dataset if kind == "image" else write_speech_dataset
    source = Source([write(tmp_path / "s", num_train=4)], "train")
    dataset = PlannedDataset(source, views[kind], seed=3)
    content = {"speech": "waveform", "waveform": "waveform", "image": "images"}[kind]

    def seen(epoch: int | None) -> list[torch.Tensor]:
        epochs = None if epoch is None else ((epoch,),)
        return [dataset[MicroBatch(((i,),), epochs)].tensors[content] for i in range(4)]

    def differ(one: int | None, other: int | None) -> bool:
        pairs = zip(seen(one), seen(other), strict=True)
        return any(a.shape != b.shape or not torch.equal(a, b) for a, b in pairs)

    assert differ(0, 1) and differ(0, None)
    assert not differ(1, 1) and not differ(None, None)


def test_sample_longer_than_a_batch_is_rejected(tmp_path: Path, tokenizer: Tokenizer) -> None:
    samples = [speech_sample(f"clip{i}", ["cat"] * i, seed=i) for i in (1, 7, 2)]
    source = Source([write_dataset(tmp_path / "s", "speech", {"train": samples})], "train")
    lengths = _dataset(source, tokenizer).view.lengths(source)
    with pytest.raises(DataError, match=r"sample 1 of .*/s/train \(key clip7\) has length"):
        Plan(lengths, Batching("bucket", 10_000, int(lengths.all().max()) - 1), 0, source.describe)


def test_broken_samples_are_dropped_and_reported(
    tmp_path: Path, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    whole = [speech_sample(f"whole{i}", ["cat"], seed=i) for i in range(2)]
    key, members, cost = speech_sample("broken", ["door"], seed=9)
    broken = (key, [("flac", b"no sound"), *members[1:]], cost)
    manifest = write_dataset(tmp_path / "s", "speech", {"train": [whole[0], broken, whole[1]]})
    dataset = _dataset(Source([manifest], "train"), tokenizer)
    batches = [MicroBatch(((0,), (1,))), MicroBatch(((1,),)), MicroBatch(((2,),))]
    with caplog.at_level(logging.WARNING):
        loader = Loader(dataset, batches)
        seen = list(loader)
    num_samples, bad = loader.take_read()
    assert (num_samples, len(bad)) == (4, 2) and loader.take_read() == (0, [])
    assert bad[0].name == f"sample 1 of {tmp_path / 's/train'} (key broken)"
    assert "broken audio clip" in bad[0].reason and bad[0] == bad[1]
    assert [int((batch["lengths"] > 0).sum()) for batch in seen] == [1, 0, 1]
    assert f"dropped sample 1 of {tmp_path / 's/train'} (key broken): " in caplog.text
    assert "broken audio clip" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 1])
def test_workers_report_bad_samples(num_workers: int, tmp_path: Path, tokenizer: Tokenizer) -> None:
    key, members, cost = speech_sample("broken", ["door"], seed=9)
    samples = [(key, [("flac", b"no sound"), *members[1:]], cost)]
    source = Source([write_dataset(tmp_path / "s", "speech", {"train": samples})], "train")
    loader = Loader(_dataset(source, tokenizer), [MicroBatch(((0,),))], num_workers)
    list(loader)
    num_samples, (bad,) = loader.take_read()
    assert num_samples == 1 and "key broken" in bad.name


def test_cpu_batches_are_not_copied() -> None:
    batch = {"x": torch.ones(3)}
    assert DeviceCopies(torch.device("cpu"))(batch)["x"] is batch["x"]


@pytest.mark.gpu
def test_copies_are_complete_while_the_gpu_is_busy() -> None:
    device = torch.device("cuda", 0)
    copies = DeviceCopies(device)
    busy = torch.randn(4096, 4096, device=device)
    sums = []
    for number in range(20):
        host = {"x": torch.full((1_000_000,), float(number)).pin_memory()}
        busy = busy @ busy / busy.norm()  # queued work that a copy must not wait for
        copied = copies(host)
        sums.append(copied["x"].sum())
        del copied  # its memory must not be reused before the sum is done
    assert [int(each) for each in sums] == [number * 1_000_000 for number in range(20)]


def test_sizes_for_kernels_stay_on_the_host() -> None:
    batch = {"input_ids": torch.zeros(2, 3), "longest_document": torch.tensor(2)}
    copied = to_device(batch, torch.device("meta"))
    assert {name: t.device.type for name, t in copied.items()} == {
        "input_ids": "meta", "longest_document": "cpu",
    }  # fmt: skip
