"""Datasets at a URL: manifest and sidecars are copied when opened, tars are cached when read.

The copies lie under `CACHE/datasets/FINGERPRINT`, which takes the place of the dataset's folder: index
and columns are local files as always, only the tars come from elsewhere. Everything that is copied is
compared with the SHA-256 in the manifest. Object stores are asked for their folders; over HTTP, which
has no listing, `datasets.json` names them: `["text", "asr"]`; so does `masks.json` in a dataset name the
masks of its `exclude` folder: `["dedup"]`.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from muomni.data.shards.cache import RemoteShard, ShardCache
from muomni.data.shards.manifest import MANIFEST_NAME, Manifest, Origin, ShardRecord, Task
from muomni.data.shards.prefetch import Prefetcher
from muomni.data.shards.tar_index import index_path
from muomni.data.shards.writer import columns_path
from muomni.errors import DataError
from muomni.io.atomic_write import write_atomic
from muomni.io.file_lock import exclusive_lock
from muomni.io.hashing import sha256_bytes
from muomni.io.remote_folder import RemoteFolder

LISTING_NAME = "datasets.json"
MASK_LISTING_NAME = "masks.json"
MASK_FOLDER = "exclude"
# Reads go to any shard of the split, and each open one is kept from eviction.
MAX_OPEN_TARS = 2
_NUM_AHEAD = 8
_NUM_THREADS = 16


def find_remote_datasets(folder: RemoteFolder, cache: Path, max_bytes: int) -> list[Manifest]:
    """The datasets in the folder itself and in its direct subfolders, in order of their names.

    Raises `DataError` when there is none or a manifest is malformed.
    """
    listing = folder.read_if_present(LISTING_NAME)
    names = folder.folders() if listing is None else _parse_names(listing, folder, LISTING_NAME)
    places = [folder, *(folder.inside(name) for name in names)]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        contents = list(pool.map(lambda place: place.read_if_present(MANIFEST_NAME), places))
    found = []
    for place, content in zip(places, contents, strict=True):
        if content is not None:
            found.append(_parse(content, Origin(place, cache, max_bytes)))
        elif listing is not None and place is not folder:
            raise DataError(
                f"{place.url} has no {MANIFEST_NAME}, but {folder.url_of(LISTING_NAME)} names it; "
                "correct the listing or copy the dataset there"
            )
    if not found:
        raise DataError(
            f"{folder.url} holds no dataset: there is no {MANIFEST_NAME} at it or in a folder below; "
            f'over HTTP a file {LISTING_NAME} there must name the folders, as in ["text"]'
        )
    return sorted(found, key=lambda manifest: (manifest.name, manifest.place))


def of_task(manifests: Sequence[Manifest], task: Task, url: str) -> list[Manifest]:
    """The datasets of one task; raises `DataError` when there is none."""
    found = [manifest for manifest in manifests if manifest.task == task]
    if not found:
        tasks = ", ".join(sorted({manifest.task for manifest in manifests}))
        raise DataError(f"{url} holds no dataset of task {task!r}, only of {tasks}")
    return found


class CachedTars:
    """The tars of one split of a remote dataset, by their number in the split.

    Fetches the split's sidecars at construction. Picklable; raises `DataError`.
    """

    def __init__(self, manifest: Manifest, split: str) -> None:
        assert manifest.origin is not None
        records = manifest.split(split).shards
        origin = manifest.origin
        for record in records:
            _check_path(record.path, origin.folder.url)
        _fetch_sidecars(records, manifest.root, origin.folder)
        _fetch_masks(manifest.root, origin.folder)
        self._shards = [RemoteShard(r.path, r.sha256, r.num_bytes) for r in records]
        self._cache = ShardCache(origin.cache_dir, origin.max_bytes, origin.folder)
        self._prefetcher: Prefetcher | None = None

    def open(self, shard: int) -> int:
        """A descriptor of the tar, downloaded when it is not in the cache; close it after use."""
        return self._cache.open(self._shards[shard])

    def expect(self, shards: Sequence[int]) -> None:
        """The tars that will be read next, soonest first: fetched ahead, and evicted last."""
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._cache, _NUM_AHEAD)
        self._prefetcher.expect([self._shards[shard] for shard in shards])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_prefetcher": None}


def _parse_names(content: bytes, folder: RemoteFolder, listing: str) -> list[str]:
    try:
        names = json.loads(content)
    except ValueError:
        names = None
    if not isinstance(names, list) or not all(
        isinstance(name, str) and name and "/" not in name and name != ".." for name in names
    ):
        raise DataError(
            f'{folder.url_of(listing)} must be a JSON list of names without "/", as in ["text", "asr"]'
        )
    return names


def _parse(content: bytes, origin: Origin) -> Manifest:
    url = origin.folder.url_of(MANIFEST_NAME)
    manifest = Manifest.parse(content, origin.cache_dir, url)
    # The fingerprint was computed from the shards, so it is safe as a name.
    root = origin.cache_dir / "datasets" / manifest.fingerprint
    return manifest.model_copy(update={"root": root, "origin": origin})


def _check_path(path: str, url: str) -> None:
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or not path.endswith(".tar"):
        raise DataError(f"the manifest of {url} names a shard {path!r} outside of the dataset")


def _fetch_sidecars(records: Sequence[ShardRecord], root: Path, folder: RemoteFolder) -> None:
    """Copy index and columns of all shards below `root`, once for all processes of the node."""
    wanted = []
    for record in records:
        index, columns = index_path(Path(record.path)), columns_path(Path(record.path))
        wanted += [(index, record.index_sha256), (columns, record.columns_sha256)]

    def fetch(entry: tuple[Path, str]) -> None:
        name, sha256 = entry
        content = folder.read(name.as_posix())
        if sha256_bytes(content) != sha256:
            raise DataError(
                f"{folder.url_of(name.as_posix())} has another SHA-256 than the manifest says; copy the "
                "dataset there again"
            )
        write_atomic(root / name, content)

    if all((root / name).is_file() for name, _ in wanted):
        return
    root.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(root / "sidecars.lock"), ThreadPoolExecutor(_NUM_THREADS) as pool:
        missing = [(name, sha256) for name, sha256 in wanted if not (root / name).is_file()]
        for _ in pool.map(fetch, missing):
            continue


def _fetch_masks(root: Path, folder: RemoteFolder) -> None:
    """Make the masks below `root` those of the remote dataset, which may have changed since."""
    listing = folder.read_if_present(MASK_LISTING_NAME)
    if listing is None:
        found = folder.files_in(MASK_FOLDER)
        names = [name.removesuffix(".json") for name in found if name.endswith(".json")]
    else:
        names = _parse_names(listing, folder, MASK_LISTING_NAME)
    contents = {}
    for name in names:
        for file in (f"{name}.npy", f"{name}.json"):  # a mask counts from its .json on
            contents[file] = folder.read(f"{MASK_FOLDER}/{file}")
    local = root / MASK_FOLDER
    root.mkdir(parents=True, exist_ok=True)
    with exclusive_lock(root / "masks.lock"):
        for path in sorted(local.glob("*.json")):
            if path.name not in contents:
                path.unlink()
        for file, content in contents.items():
            if not (local / file).is_file() or (local / file).read_bytes() != content:
                write_atomic(local / file, content)
