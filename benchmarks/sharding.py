"""How fast data_prep writes shards, against `tar` and `sha256sum` of the same files.

    OMP_NUM_THREADS=1 python benchmarks/sharding.py --num-images 5000 --json benchmarks/results/sharding.json

Makes JPEGs of about 20 kB with captions beside them in a temporary folder. Each round runs all ways once,
one after the other; the medians over the rounds are shown, in seconds of the processor (what a core
needs, whatever else runs on the machine) and of the clock. data_prep also makes index, columns, json
members and content hashes, and with `decode` it decodes every image. With --resize images are
made smaller: data_prep, which decodes, resizes and writes shards, against the resizer of img2dataset, which
keeps nothing, where that is installed, else against a plain loop over Pillow. Once with these images at
half their size, which OpenCV averages in whole pixels, and once with photographs' 640 x 480 to a shorter
side of 256, a fifth as many.
"""

import argparse
import importlib.util
import io
import json
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
from data_prep.options import Preprocessing, ReaderOptions
from data_prep.readers import find_reader
from data_prep.sharding.shard_plan import ShardingOptions, ShardPlan, build_plan
from data_prep.sharding.sharder import write_shards

_SIDE, _QUALITY, _RESIZED_QUALITY = 256, 92, 90
_PHOTOGRAPH, _PHOTOGRAPH_RATIO = (640, 480), 5


@dataclass(frozen=True)
class Way:
    """Something that is done with a folder of `num_images`; `run` gets a folder for what it writes."""

    num_images: int
    run: Callable[[Path], None]


class _Silent:
    """Progress that nobody looks at."""

    def update(self, n: int) -> None: ...


def main() -> None:
    flags = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    flags.add_argument("--num-images", type=int, default=5000)
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--resize", action="store_true", help="also make images smaller")
    flags.add_argument("--json", type=Path)
    arguments = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(Path(folder), arguments)
    print(f"{'way':34}{'cpu s':>9}{'clock s':>9}{'images/s of a core':>20}")
    for name, row in results.items():
        rate = row["num_images"] / row["cpu_s"]
        print(f"{name:34}{row['cpu_s']:>9.3f}{row['clock_s']:>9.3f}{rate:>20,.0f}")
    if arguments.json:
        content = {"ways": results, "machine": machine_facts()}
        arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def measure(root: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of each way over all rounds."""
    source = root / "images"
    make_images(source, arguments.num_images, (_SIDE, _SIDE))
    ways = {
        "tar, then sha256sum": lambda out: tar_and_hash(source, out),
        "data_prep, header checked": writer(source, Preprocessing(check="header")),
        "data_prep, all decoded": writer(source, Preprocessing()),
    }
    all_ways = {name: Way(arguments.num_images, run) for name, run in ways.items()}
    if arguments.resize:
        photographs = root / "photographs"
        num_photographs = arguments.num_images // _PHOTOGRAPH_RATIO
        make_images(photographs, num_photographs, _PHOTOGRAPH)
        all_ways |= resizing_ways(source, arguments.num_images, _SIDE // 2)
        all_ways |= resizing_ways(photographs, num_photographs, _SIDE)
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in all_ways}
    for _ in range(arguments.rounds):
        for name, way in all_ways.items():
            spent[name].append(timed(way.run, root / "out"))
    return {
        name: {
            "num_images": all_ways[name].num_images,
            "cpu_s": statistics.median(cpu for cpu, _ in times),
            "clock_s": statistics.median(clock for _, clock in times),
            "all_cpu_s": [round(cpu, 4) for cpu, _ in times],
        }
        for name, times in spent.items()
    }


def resizing_ways(source: Path, num_images: int, shorter: int) -> dict[str, Way]:
    """Ours and the peer's way to make the images of a folder smaller."""
    preprocessing = Preprocessing(
        resize_shorter=shorter, image_format="jpeg", quality=_RESIZED_QUALITY
    )
    name, resize = peer_resizer(shorter)
    return {
        f"data_prep, {source.name} to {shorter}": Way(num_images, writer(source, preprocessing)),
        f"{name}, {source.name} to {shorter}": Way(
            num_images, lambda out: resize_all(source, resize)
        ),
    }


def make_images(folder: Path, num_images: int, size: tuple[int, int]) -> None:
    """Smooth noise as JPEG (about 20 kB at 256 x 256), each with a caption of one line."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(num_images):
        noise = random.integers(0, 255, (24, 24, 3), dtype=np.uint8)
        image = Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"{number:08d}.jpg", quality=_QUALITY)
        (folder / f"{number:08d}.txt").write_text(f"an image with the number {number}")


def timed(way: Callable[[Path], None], out: Path) -> tuple[float, float]:
    """Seconds of the processor, children included, and of the clock; the output is deleted."""
    os.sync()
    before, start = _cpu_s(), time.perf_counter()
    way(out)
    spent = _cpu_s() - before, time.perf_counter() - start
    subprocess.run(["rm", "-rf", str(out)], check=True)
    return spent


def _cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def tar_and_hash(source: Path, out: Path) -> None:
    """Pack all files in the order of their names, bring them to disk, hash the result."""
    out.mkdir()
    tar = out / "all.tar"
    subprocess.run(["tar", "--sort=name", "-cf", str(tar), "-C", str(source), "."], check=True)
    with tar.open("rb") as file:
        os.fsync(file.fileno())
    subprocess.run(["sha256sum", str(tar)], check=True, stdout=subprocess.DEVNULL)


def writer(source: Path, preprocessing: Preprocessing) -> Callable[[Path], None]:
    """Writes the shards of a plan that is made beforehand, as tar is given its files."""
    plan = planned(source, preprocessing)

    def write(out: Path) -> None:
        write_shards(plan, out, 1, (0, 1), _Silent())

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
    """Name and function of what is compared with; `shorter` is the side that is asked for."""
    package = importlib.util.find_spec("img2dataset")
    if package is None or not package.submodule_search_locations:
        return "plain Pillow loop", partial(_plain_resize, shorter)
    # The file alone: the package itself asks for much that resizing does not need.
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
    """Read and resize all images; the peer's result is not even written."""
    for path in sorted(source.glob("*.jpg")):
        if not resize(path.read_bytes()):
            raise RuntimeError(f"{path} was not resized")


if __name__ == "__main__":
    main()
