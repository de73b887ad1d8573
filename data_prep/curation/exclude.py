"""Write exclusion masks: lists of samples that training skips, without rewriting shards.

`muomni/data/shards/exclusion_mask.py` defines the format; this module adds the key `reason`.
"""

import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muomni.data.shards.exclusion_mask import FOLDER, mask_files, read_mask
from muomni.data.shards.manifest import Manifest, hash64
from muomni.data.shards.writer import columns_path, load_columns
from muomni.errors import ConfigError, DataError
from muomni.io.atomic_write import write_atomic


@dataclass(frozen=True, slots=True)
class Mask:
    """A written mask: file, split, ids uint64 [num_ids], and reason."""

    path: Path
    split: str
    ids: np.ndarray
    reason: str


def write_mask(manifest: Manifest, name: str, split: str, ids: np.ndarray, reason: str) -> Mask:
    """Write the mask `name`, replacing an earlier one.

    Raises `ConfigError` for an invalid name, and `DataError` for ids outside of the split.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise ConfigError(f"--name {name!r} must consist of 1 to 64 letters, digits, _, or -")
    ids = np.unique(np.asarray(ids, dtype="<u8"))
    num_samples = manifest.split(split).num_samples
    if len(ids) and int(ids[-1]) >= num_samples:
        raise DataError(
            f"sample {int(ids[-1])} is outside of split {split} of {manifest.root}, which has "
            f"{num_samples} samples"
        )
    buffer = io.BytesIO()
    np.save(buffer, ids)
    folder = manifest.root / FOLDER
    content = {"split": split, "ids_file": f"{name}.npy", "reason": reason, "num_ids": len(ids)}
    # The ids come first, so that a visible mask is complete.
    write_atomic(folder / f"{name}.npy", buffer.getvalue())
    write_atomic(folder / f"{name}.json", (json.dumps(content, indent=1) + "\n").encode())
    return Mask(folder / f"{name}.json", split, ids, reason)


def remove_mask(root: Path, name: str) -> None:
    """Delete the mask `name` if it exists."""
    for suffix in (".json", ".npy"):
        (root / FOLDER / f"{name}{suffix}").unlink(missing_ok=True)


def mask_problems(manifest: Manifest) -> list[str]:
    """Messages about the invalid masks of a dataset."""
    problems = []
    for path in mask_files(manifest.root):
        try:
            read_mask(path, manifest)
        except DataError as error:
            problems.append(f"mask {path} cannot be used ({error})")
    return problems


def refuse_masks(root: Path) -> None:
    """Raise `DataError` if there are masks: rewriting shards would change the ids of samples."""
    first = next(iter(mask_files(root)), None)
    if first is not None:
        raise DataError(
            f"shards of {root} must be rewritten, which changes the sample ids in the mask {first}; "
            f"delete {root / FOLDER} first, and create its masks again afterward"
        )


def exclude_listed(manifest: Manifest, path: Path, name: str, reason: str) -> list[Mask]:
    """Write a mask per split with the samples that a JSON-lines file lists.

    A line has `key`, or `id` and optionally `split` (default: train). If several splits occur, the masks are
    called NAME-SPLIT. Raises `DataError` for an invalid line or an unknown sample.
    """
    ids_by_key = _ids_by_key(manifest)
    found: dict[str, list[int]] = {}
    for number, entry in _entries(path):
        split, id_ = _locate(manifest, ids_by_key, entry, f"{path} line {number}")
        found.setdefault(split, []).append(id_)
    if not found:
        raise DataError(f"{path} lists no sample")
    return [
        write_mask(
            manifest, name if len(found) == 1 else f"{name}-{split}", split, np.array(ids), reason
        )
        for split, ids in found.items()
    ]


def _entries(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error.reason}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if not isinstance(entry, dict):
            raise DataError(f'{path} line {number} is not a JSON object with "key" or "id"')
        yield number, entry


def _ids_by_key(manifest: Manifest) -> dict[int, tuple[str, int]]:
    """Split and id of each sample by the hash of its key."""
    ids: dict[int, tuple[str, int]] = {}
    for name, split in manifest.splits.items():
        start = 0
        for shard in split.shards:
            hashes = load_columns(columns_path(manifest.root / shard.path))["key_hash"]
            ids.update((int(key), (name, start + row)) for row, key in enumerate(hashes))
            start += len(hashes)
    return ids


def _locate(
    manifest: Manifest, ids_by_key: dict[int, tuple[str, int]], entry: dict[str, object], where: str
) -> tuple[str, int]:
    key, id_ = entry.get("key"), entry.get("id")
    if isinstance(key, str):
        found = ids_by_key.get(hash64(key))
        if found is None:
            raise DataError(f"{where}: {manifest.root} has no sample {key!r}")
        return found
    if isinstance(id_, int) and not isinstance(id_, bool):
        split = str(entry.get("split", "train"))
        if not 0 <= id_ < manifest.split(split).num_samples:
            raise DataError(f"{where}: split {split} of {manifest.root} has no sample {id_}")
        return split, id_
    raise DataError(f'{where} has neither "key" nor an integer "id"')
