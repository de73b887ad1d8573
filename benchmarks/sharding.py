"""Speed of writing shards with data_prep, compared with `tar` and `sha256sum` on the same files.

    OMP_NUM_THREADS=1 python benchmarks/sharding.py --num-images 5000 --json benchmarks/results/sharding.json

Uses JPEGs of about 20 kB with captions in a temporary folder. Each round runs all variants once; medians over
rounds are reported, in CPU seconds (independent of other processes) and wall-clock seconds. data_prep also
writes index, columns, JSON members, and content hashes, and decodes every image in one variant. --resize
also compares resizing: data_prep, which decodes, resizes, and writes shards, with the resizer of img2dataset
(or a Pillow loop if that is not installed), which writes nothing. Once for these images at half their size,
which OpenCV computes as an average of full pixels, and once for 640 x 480 photographs (a fifth as many)
with a shorter side of 256.
"""

import argparse
import importlib.util
import io
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_facts
from data_prep.corpus import ReaderOptions
from data_prep.media.preprocessing import Preprocessing
from data_prep.readers import find_reader
from data_prep.sharding.shard_plan import ShardingOptions, ShardPlan, build_plan
from data_prep.sharding.sharder import write_shards
from muomni.io.count_progress import ProgressLines

_SIDE, _QUALITY, _RESIZED_QUALITY = 256, 92, 90
_PHOTOGRAPH, _PHOTOGRAPH_RATIO = (640, 480), 5


@dataclass(frozen=True)
class Variant:
    """A way to process a folder of `num_images`; `run` takes an output folder."""

    num_images: int
    run: Callable[[Path], None]


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--num-images", type=int, default=5000)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--resize", action="store_true", help="also compare resizing")
    flags.add_argument("--json", type=Path)
    arguments = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), arguments)
    print(f"{'variant':34}{'cpu s':>9}{'clock s':>9}{'images/s of a core':>20}")
    for name, row in results.items():
        rate = row["num_images"] / row["cpu_s"]
        print(f"{name:34}{row['cpu_s']:>9.3f}{row['clock_s']:>9.3f}{rate:>20,.0f}")
    if arguments.json:
        content = {"ways": results, "machine": machine_facts()}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measure(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of each variant over all rounds."""
    source = root / "images"
    make_images(source, arguments.num_images, (_SIDE, _SIDE))
    sharding = {
        "tar, then sha256sum": lambda out: tar_and_hash(source, out),
        "data_prep, header checked": writer(source, Preprocessing(check="header")),
        "data_prep, all decoded": writer(source, Preprocessing()),
    }
    variants = {name: Variant(arguments.num_images, run) for name, run in sharding.items()}
    if arguments.resize:
        photographs = root / "photographs"
        num_photographs = arguments.num_images // _PHOTOGRAPH_RATIO
        make_images(photographs, num_photographs, _PHOTOGRAPH)
        variants |= resizing_variants(source, arguments.num_images, _SIDE // 2)
        variants |= resizing_variants(photographs, num_photographs, _SIDE)
    times_of: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(arguments.rounds):
        for name, variant in variants.items():
            times_of[name].append(timed(variant.run, root / "out"))
    return {
        name: {
            "num_images": variants[name].num_images,
            "cpu_s": statistics.median(cpu for cpu, _ in times),
            "clock_s": statistics.median(clock for _, clock in times),
            "all_cpu_s": [round(cpu, 4) for cpu, _ in times],
        }
        for name, times in times_of.items()
    }


def resizing_variants(source: Path, num_images: int, shorter: int) -> dict[str, Variant]:
    """Resizing the images of a folder with data_prep and with the peer."""
    preprocessing = Preprocessing(
        resize_shorter=shorter, image_format="jpeg", quality=_RESIZED_QUALITY
    )
    name, resize = peer_resizer(shorter)
    return {
        f"data_prep, {source.name} to {shorter}": Variant(
            num_images, writer(source, preprocessing)
        ),
        f"{name}, {source.name} to {shorter}": Variant(
            num_images, lambda out: resize_all(source, resize)
        ),
    }


def make_images(folder: Path, num_images: int, size: tuple[int, int]) -> None:
    """Write smooth noise as JPEGs (about 20 kB at 256 x 256), each with a one-line caption."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(num_images):
        noise = random.integers(0, 255, (24, 24, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"{number:08d}.jpg", quality=_QUALITY)
        (folder / f"{number:08d}.txt").write_text(f"an image with the number {number}")


def timed(run: Callable[[Path], None], out: Path) -> tuple[float, float]:
    """CPU seconds (including children) and wall-clock seconds; deletes the output."""
    os.sync()
    before, start = _cpu_s(), time.perf_counter()
    run(out)
    spent = _cpu_s() - before, time.perf_counter() - start
    subprocess.run(["rm", "-rf", str(out)], check=True)
    return spent


def _cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def tar_and_hash(source: Path, out: Path) -> None:
    """Pack all files sorted by name, sync to disk, and hash the tar."""
    out.mkdir()
    tar = out / "all.tar"
    subprocess.run(["tar", "--sort=name", "-cf", str(tar), "-C", str(source), "."], check=True)
    with tar.open("rb") as file:
        os.fsync(file.fileno())
    subprocess.run(["sha256sum", str(tar)], check=True, stdout=subprocess.DEVNULL)


def writer(source: Path, preprocessing: Preprocessing) -> Callable[[Path], None]:
    """Return a function that writes the shards of a precomputed plan."""
    plan = planned(source, preprocessing)

    def write(out: Path) -> None:
        write_shards(plan, out, 1, (0, 1), ProgressLines(None, "shards", every_s=math.inf))

    return write


def planned(source: Path, preprocessing: Preprocessing) -> ShardPlan:
    options = ShardingOptions(
        name="bench",
        task="image-caption",
        reader="folder",
        reader_options={},
        source=source,
        val_fraction=0.0,
        test_fraction=0.0,
        preprocessing=preprocessing,
    )
    return build_plan(find_reader("image-caption", "folder")(source, ReaderOptions()), options)


def peer_resizer(shorter: int) -> tuple[str, Callable[[bytes], bytes]]:
    """Name and function of the peer; `shorter` is the target size of the shorter side."""
    package = importlib.util.find_spec("img2dataset")
    if package is None or not package.submodule_search_locations:
        return "plain Pillow loop", partial(_plain_resize, shorter)
    # Load only this file: the package has dependencies that resizing does not need.
    path = Path(package.submodule_search_locations[0]) / "resizer.py"
    spec = importlib.util.spec_from_file_location("img2dataset_resizer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    resizer = module.Resizer(
        image_size=shorter,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        encode_format="jpg",
        encode_quality=_RESIZED_QUALITY,
    )
    return "img2dataset", lambda data: resizer(io.BytesIO(data))[0]


def _plain_resize(shorter: int, data: bytes) -> bytes:
    image = Image.open(io.BytesIO(data)).convert("RGB")
    scale = shorter / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=_RESIZED_QUALITY)
    return buffer.getvalue()


def resize_all(source: Path, resize: Callable[[bytes], bytes]) -> None:
    """Read and resize all images without writing them."""
    for path in sorted(source.glob("*.jpg")):
        if not resize(path.read_bytes()):
            raise RuntimeError(f"{path} was not resized")


if __name__ == "__main__":
    main()
