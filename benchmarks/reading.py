"""Throughput of reading and decoding samples, compared with webdataset and litdata on the same data.

    export OMP_NUM_THREADS=1
    python benchmarks/reading.py --parts raw --json benchmarks/results/reading_raw.json
    python benchmarks/reading.py --parts images,audio --json benchmarks/results/reading_decoded.json

raw: samples per second that one process reads from the page cache without decoding: texts of 100 bytes, and
images of 20 kB with captions. muomni in training order (including planning) and in file order; webdataset
with and without shuffling; litdata, if installed, on the same members written by its `optimize`.

images: JPEGs of 500 x 375 to uint8 [64, 3, 224, 224] and token ids, in worker processes. webdataset decodes
with Pillow (`pilrgb`) or to tensors (`torchrgb8`), torchvision resizes (bicubic, antialiased) the image or
tensor and crops the center, and the workers form batches; muomni is compared with the fastest of these.

audio: FLACs to padded float32 [16, N] at 16 kHz and labels, in worker processes; webdataset with a soundfile
decoder, since its own needs torchcodec, and torchaudio's resampler. All use the same tokenizer.

Each round runs all variants once; medians over rounds are reported. Timing of a pipeline starts after its
workers deliver. The corpora are in a temporary folder, and thus in the page cache.
"""

import argparse
import contextlib
import importlib
import importlib.util
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.generated_corpora import audio_clips, images, tar_paths, texts, write_dataset
from benchmarks.machine import machine_facts
from data_prep.train_tokenizer import train_tokenizer
from muomni.config.models import SAMPLE_RATE_HZ
from muomni.data.loading.loader import Loader, PlannedDataset
from muomni.data.sampling.plan import Batching, Plan
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.source import Source
from muomni.data.text.ctc_units import CtcUnits
from muomni.data.views.base import View
from muomni.data.views.image_text import ImageTextView
from muomni.data.views.speech import SpeechView
from muomni.errors import exit_on_error

_RAW_BATCH, _IMAGE_BATCH, _AUDIO_BATCH = 32, 64, 16
_SIDE, _MAX_TOKENS, _PREFETCH, _VOCAB_SIZE = 224, 64, 4, 1024
_RATES_HZ = (16000, 22050)

Sample = dict[str, Any]
Batch = dict[str, torch.Tensor]
# Returns an infinite iterable of batches.
Pipeline = Callable[[], Iterable[Batch]]


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--parts", default="raw,images,audio")
    flags.add_argument("--texts", type=int, default=100_000)
    flags.add_argument("--images", type=int, default=5_000)
    flags.add_argument("--audio-clips", type=int, default=1_000)
    flags.add_argument(
        "--batches", type=int, default=24, help="number of timed batches per pipeline"
    )
    flags.add_argument("--workers", default="1,2")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--json", type=Path)
    arguments = flags.parse_args()
    parts = {"raw": raw, "images": decoded_images, "audio": decoded_audio}
    results: dict[str, dict[str, Any]] = {}
    with exit_on_error("reading"), tempfile.TemporaryDirectory() as folder:
        for name in arguments.parts.split(","):
            results |= parts[name](Path(folder), arguments)
    for name, comparison in results.items():
        print(f"\n{name}, {comparison['unit']}/s")
        for variant, rate in comparison["rates"].items():
            print(f"  {variant:34}{rate:>14,.0f}")
        for peer, ratio in comparison["ratios"].items():
            print(f"  ours against {peer:21}{ratio:>13.2f}x")
    if arguments.json:
        content = {"comparisons": results, "machine": machine_facts()}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


# -- raw samples ---------------------------------------------------------------------------------------
def raw(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Samples per second of each variant, on texts and on images."""
    corpora = {
        "raw texts": write_dataset(
            root / "raw_texts", "text", texts(arguments.texts), arguments.texts // 10
        ),
        "raw images": write_dataset(
            root / "raw_images",
            "image-caption",
            images(arguments.images, (256, 192), 92, 200),
            arguments.images // 5,
        ),
    }
    return {name: _raw(manifest, arguments.rounds) for name, manifest in corpora.items()}


def _raw(manifest: Manifest, num_rounds: int) -> dict[str, Any]:
    variants = raw_variants(manifest)
    expected = manifest.split("train").totals
    for name, read in variants.items():
        read_bytes = [sum(map(len, _members(sample).values())) for sample in read()]
        if (len(read_bytes), sum(read_bytes)) != (expected.num_samples, expected.num_bytes):
            raise RuntimeError(f"{name} read {len(read_bytes)} samples, expected {expected}")
    rates: dict[str, list[float]] = {name: [] for name in variants}
    cpu_rates: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(num_rounds):
        for name, read in variants.items():
            cpu, start = time.process_time(), time.perf_counter()
            num = sum(1 for _ in read())
            rates[name].append(num / (time.perf_counter() - start))
            cpu_rates[name].append(num / (time.process_time() - cpu))
    result = comparison("samples", rates, _raw_peers)
    return {**result, "of_a_core": comparison("samples", cpu_rates, _raw_peers)["ratios"]}


def raw_variants(manifest: Manifest) -> dict[str, Callable[[], Iterable[Any]]]:
    """Functions that iterate over all samples of a dataset once."""
    from webdataset.compat import WebDataset

    tars = tar_paths(manifest)
    source = Source([manifest], "train")
    variants: dict[str, Callable[[], Any]] = {
        "ours, order of training": partial(_in_planned_order, source),
        "ours, order of files": lambda: map(source.read, range(len(source))),
        "webdataset": lambda: WebDataset(tars, shardshuffle=False),
        "webdataset, shuffled": lambda: WebDataset(tars, shardshuffle=100).shuffle(1000),
    }
    if importlib.util.find_spec("litdata") is not None:
        litdata = importlib.import_module("litdata")
        folder = str(manifest.root.with_name(manifest.root.name + "_litdata"))
        _optimize(manifest, folder)
        variants["litdata"] = lambda: litdata.StreamingDataset(folder)
        variants["litdata, shuffled"] = lambda: litdata.StreamingDataset(folder, shuffle=True)
    return variants


def _in_planned_order(source: Source) -> Iterator[Sample]:
    """One epoch; the last micro-batch is truncated, since it extends into the next epoch."""
    plan = Plan(
        np.ones(len(source), dtype=np.int64), Batching("fixed", _RAW_BATCH, _RAW_BATCH), seed=0
    )
    num_left = len(source)
    for batch in plan.rank_batches(0, 0, 1):
        for index in batch.ids[:num_left]:
            yield source.read(index)
        num_left -= len(batch.ids)
        if num_left <= 0:
            return


def _optimize(manifest: Manifest, folder: str) -> None:
    """Write the members of all samples as a litdata dataset."""
    litdata = importlib.import_module("litdata")
    source = Source([manifest], "train")
    with contextlib.redirect_stdout(io.StringIO()):
        litdata.optimize(
            source.read, list(range(len(source))), folder, chunk_bytes="64MB", num_workers=1,
            verbose=False,
        )  # fmt: skip


def _members(sample: Sample) -> dict[str, bytes]:
    return {name: data for name, data in sample.items() if not name.startswith("__")}


def _raw_peers(rates: dict[str, float]) -> dict[str, float]:
    """Ratios of muomni to the peers, by sample order."""
    planned, in_order = rates["ours, order of training"], rates["ours, order of files"]
    ratios = {
        "webdataset (shuffled)": planned / rates["webdataset, shuffled"],
        "webdataset (plain)": planned / rates["webdataset"],
        "webdataset (both plain)": in_order / rates["webdataset"],
    }
    if "litdata" in rates:
        ratios["litdata (shuffled)"] = planned / rates["litdata, shuffled"]
        ratios["litdata (both plain)"] = in_order / rates["litdata"]
    return ratios


# -- decoded batches -----------------------------------------------------------------------------------
def decoded_images(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Images per second of each pipeline, by number of workers."""
    manifest = write_dataset(
        root / "images",
        "image-caption",
        images(arguments.images, (500, 375), 92, 200),
        max(1, arguments.images // 8),
    )
    tokenizer = train_tokenizer([manifest.root], _VOCAB_SIZE, root / "images.model")
    view = ImageTextView(tokenizer, _SIDE, _MAX_TOKENS, None)
    results = {}
    for num_workers in map(int, arguments.workers.split(",")):
        pipelines: dict[str, Pipeline] = {
            "ours": partial(own_batches, manifest, view, _IMAGE_BATCH, num_workers)
        }
        for decoder in ("pilrgb", "pilrgb+tensor", "torchrgb8"):
            pipelines[f"webdataset, {decoder}"] = partial(
                peer_images, manifest, decoder, view.token_ids, num_workers
            )
        results[f"images, {num_workers} workers"] = measure(
            pipelines, lambda batch: len(batch["images"]), "images", num_workers, arguments
        )
    return results


def decoded_audio(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds of audio per second of each pipeline, by sample rate and number of workers."""
    results = {}
    for rate_hz in _RATES_HZ:
        manifest = write_dataset(
            root / f"speech_{rate_hz}",
            "speech",
            audio_clips(arguments.audio_clips, rate_hz, 64),
            max(1, arguments.audio_clips // 8),
        )
        tokenizer = train_tokenizer([manifest.root], _VOCAB_SIZE, root / "speech.model")
        units = CtcUnits(tokenizer, None)
        for num_workers in map(int, arguments.workers.split(",")):
            pipelines: dict[str, Pipeline] = {
                "ours": partial(
                    own_batches, manifest, SpeechView(units, False), _AUDIO_BATCH, num_workers
                ),
                "webdataset, soundfile": partial(peer_audio, manifest, units.encode, num_workers),
            }
            results[f"audio, {rate_hz} Hz files, {num_workers} workers"] = measure(
                pipelines, _audio_s, "audio_s", num_workers, arguments
            )
    return results


def measure(
    pipelines: dict[str, Pipeline],
    count: Callable[[Batch], float],
    unit: str,
    num_workers: int,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Units per second of each pipeline."""
    rates: dict[str, list[float]] = {name: [] for name in pipelines}
    for _ in range(arguments.rounds):
        for name, pipeline in pipelines.items():
            batches = iter(pipeline())
            for _ in itertools.islice(batches, 2 * num_workers):
                continue  # warm up: start workers, open files, fill shuffle buffers
            start = time.perf_counter()
            total = sum(count(batch) for batch in itertools.islice(batches, arguments.batches))
            rates[name].append(total / (time.perf_counter() - start))
            del batches
    return comparison(unit, rates, _best_peer)


def own_batches(
    manifest: Manifest, view: View[Any], size: int, num_workers: int
) -> Iterable[Batch]:
    """The loader, as in training."""
    source = Source([manifest], "train")
    plan = Plan(view.lengths(source), Batching("fixed", size, size), seed=0)
    return Loader(
        PlannedDataset(source, view, 0), plan.rank_batches(0, 0, 1), num_workers, _PREFETCH
    )


def peer_images(
    manifest: Manifest, decoder: str, encode: Callable[[str], list[int]], num_workers: int
) -> Iterable[Batch]:
    """`decoder` is one of webdataset; "+tensor" converts to a tensor before resizing, as torchvision
    recommends."""
    from torchvision.transforms import v2

    resize = [v2.Resize(_SIDE, v2.InterpolationMode.BICUBIC, antialias=True), v2.CenterCrop(_SIDE)]
    steps = {
        "pilrgb": [*resize, v2.PILToTensor()],
        "pilrgb+tensor": [v2.PILToTensor(), *resize],
        "torchrgb8": resize,
    }[decoder]
    return _web_loader(
        manifest,
        lambda dataset: (
            dataset.decode(decoder.partition("+")[0])
            .to_tuple("jpg", "txt")
            .map_tuple(v2.Compose(steps), encode)
            .batched(_IMAGE_BATCH, partial=False, collation_fn=_collate_images)
        ),
        num_workers,
    )


def peer_audio(
    manifest: Manifest, encode: Callable[[str], list[int]], num_workers: int
) -> Iterable[Batch]:
    return _web_loader(
        manifest,
        lambda dataset: (
            dataset.decode(_decode_audio)
            .to_tuple("flac", "txt")
            .map_tuple(_resampled, encode)
            .batched(_AUDIO_BATCH, partial=False, collation_fn=_collate_audio)
        ),
        num_workers,
    )


def _web_loader(
    manifest: Manifest, stages: Callable[[Any], Any], num_workers: int
) -> Iterable[Batch]:
    """As in webdataset's documentation: shards and samples are shuffled, workers form batches."""
    from webdataset.compat import WebDataset, WebLoader

    shuffled = WebDataset(tar_paths(manifest), shardshuffle=100).shuffle(1000)
    dataset = stages(shuffled).repeat()
    prefetch = _PREFETCH if num_workers else None
    return WebLoader(dataset, batch_size=None, num_workers=num_workers, prefetch_factor=prefetch)


def _collate_images(samples: list[tuple[torch.Tensor, list[int]]]) -> Batch:
    pixels, ids = zip(*samples, strict=True)
    return {"images": torch.stack(pixels), "token_ids": _padded_ids(ids)}


def _decode_audio(key: str, data: bytes) -> tuple[np.ndarray, int] | None:
    import soundfile

    if not key.endswith("flac"):
        return None
    return soundfile.read(io.BytesIO(data), dtype="float32")


def _resampled(audio: tuple[np.ndarray, int]) -> torch.Tensor:
    waveform, rate_hz = audio
    waveform = torch.from_numpy(waveform)
    return waveform if rate_hz == SAMPLE_RATE_HZ else _resampler(rate_hz)(waveform)


@lru_cache
def _resampler(rate_hz: int) -> torch.nn.Module:
    from torchaudio.transforms import Resample

    return Resample(rate_hz, SAMPLE_RATE_HZ)


def _collate_audio(samples: list[tuple[torch.Tensor, list[int]]]) -> Batch:
    waveforms, ids = zip(*samples, strict=True)
    return {
        "waveform": torch.nn.utils.rnn.pad_sequence(list(waveforms), batch_first=True),
        "lengths": torch.tensor([len(waveform) for waveform in waveforms]),
        "labels": _padded_ids(ids),
    }


def _padded_ids(ids: Iterable[list[int]]) -> torch.Tensor:
    rows = [torch.tensor(row) for row in ids]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


def _audio_s(batch: Batch) -> float:
    return float(batch["lengths"].sum()) / SAMPLE_RATE_HZ


def _best_peer(rates: dict[str, float]) -> dict[str, float]:
    """Ratio of muomni to the fastest peer pipeline."""
    best = max((name for name in rates if name != "ours"), key=rates.__getitem__)
    return {best: rates["ours"] / rates[best]}


def comparison(
    unit: str,
    rates: dict[str, list[float]],
    ratios: Callable[[dict[str, float]], dict[str, float]],
) -> dict[str, Any]:
    """Medians over rounds, and ratios of muomni to the peers."""
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "unit": unit,
        "rates": {name: round(rate, 1) for name, rate in medians.items()},
        "ratios": {name: round(ratio, 3) for name, ratio in ratios(medians).items()},
        "all_rates": {name: [round(rate, 1) for rate in values] for name, values in rates.items()},
    }


if __name__ == "__main__":
    main()
