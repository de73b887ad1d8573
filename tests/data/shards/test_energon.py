"""Megatron-Energon prepares and reads our shards unchanged, and builds the same index.

Runs if the package is importable: `pip install megatron-energon` in a separate environment (it has many
dependencies), or into a folder on PYTHONPATH.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from muomni.data.shards.manifest import Manifest, Split, fingerprint
from muomni.data.shards.writer import SampleCost, ShardWriter

pytest.importorskip("megatron.energon", reason="needs the package megatron-energon")

SIZES = {"train": (5, 3), "val": (2,)}
PREPARE = "from megatron.energon.tools.prepare import command; command()"
READ = """
import json, sys
from megatron.energon import WorkerConfig, get_loader, get_train_dataset, get_val_dataset
workers = WorkerConfig(rank=0, world_size=1, num_workers=0)
options = dict(worker_config=workers, batch_size=None)
def pairs(loader):
    return [(sample.__key__, bytes(sample.image).hex(), sample.caption.decode()) for sample in loader]
folder = sys.argv[1]
train = get_train_dataset(
    folder, shuffle_buffer_size=None, max_samples_per_sequence=None, repeat=False, **options
)
print(json.dumps([pairs(get_loader(train)), pairs(get_loader(get_val_dataset(folder, **options)))]))
"""


def write(root: Path) -> list[list[list[str]]]:
    """Write a dataset with two splits; returns the samples that Energon must yield for each."""
    splits, expected = {}, []
    for split, sizes in SIZES.items():
        records, samples = [], []
        for number, size in enumerate(sizes):
            with ShardWriter(root, f"{split}/x-{split}-{number:06d}.tar", split) as writer:
                for i in range(size):
                    key, image, text = f"{split}_{number}_{i}", bytes([i]) * 700, f"image {i}"
                    writer.add(key, [("jpg", image), ("txt", text.encode())], key, SampleCost())
                    samples.append([key, image.hex(), text])
            assert writer.record is not None
            records.append(writer.record)
        splits[split] = Split(shards=tuple(records))
        expected.append(samples)
    manifest = Manifest(
        root=root, name="x", task="image-caption", reader="test", split_rule="given",
        fingerprint=fingerprint(splits), splits=splits,
    )  # fmt: skip
    (root / "manifest.json").write_text(manifest.to_json())
    return expected


def run(code: str, *arguments: str) -> str:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_energon_prepares_and_reads_a_dataset(tmp_path: Path) -> None:
    expected = write(tmp_path)
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.tar*"))}
    run(
        PREPARE, str(tmp_path), "--non-interactive", "--no-progress", "--num-workers", "1",
        "--split-parts", "train:train/.*", "--split-parts", "val:val/.*",
        "--sample-type", "CaptioningSample", "--field-map", '{"image": "jpg", "caption": "txt"}',
    )  # fmt: skip
    assert {path: path.read_bytes() for path in before} == before  # the same index, byte for byte
    dataset = tmp_path / ".nv-meta/dataset.yaml"
    assert dataset.is_file()
    dataset.write_text(dataset.read_text() + "\ndecoder: null\n")  # plain bytes
    found = json.loads(run(READ, str(tmp_path)).splitlines()[-1])
    assert [sorted(samples) for samples in found] == expected
