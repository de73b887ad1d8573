"""The files of a dataset at a URL: sidecars are copied when a split is opened, tars are cached when read.

The copies are in `CACHE/datasets/FINGERPRINT`, which serves as the root of the dataset: index and columns
are local files as usual, and only the tars are remote. Everything is verified against the SHA-256 in the
manifest. Object stores list the masks in the `exclude` folder of a dataset. HTTP has no listing, so
`masks.json` in the dataset lists them (`["dedup"]`).
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from muomni.data.shards.cache import RemoteShard, ShardCache
from muomni.data.shards.manifest import Manifest, ShardRecord
from muomni.data.shards.prefetch import Prefetcher
from muomni.data.shards.tar_index import index_path
from muomni.data.shards.writer import columns_path
from muomni.errors import DataError
from muomni.io.atomic_write import write_atomic
from muomni.io.file_lock import exclusive_lock
from muomni.io.hashing import sha256_bytes
from muomni.io.remote_folder import RemoteFolder

MASK_LISTING_NAME = "masks.json"
MASK_FOLDER = "exclude"
# Reads access all shards of a split, and an open shard cannot be evicted.
MAX_OPEN_TARS = 2
_NUM_AHEAD = 8
_NUM_THREADS = 16


class CachedTars:
    """The tars of one split of a remote dataset, by their number in the split.

    Downloads the split's sidecars at construction. Picklable. Raises `DataError`.
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
        """Open a tar, downloading it unless it is cached; the caller closes the descriptor."""
        return self._cache.open(self._shards[shard])

    def expect(self, shards: Sequence[int]) -> None:
        """Announce the tars to read next, soonest first: they are prefetched, and evicted last."""
        if self._prefetcher is None:
            self._prefetcher = Prefetcher(self._cache, _NUM_AHEAD)
        self._prefetcher.expect([self._shards[shard] for shard in shards])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_prefetcher": None}


def parse_listing(content: bytes, folder: RemoteFolder, listing: str) -> list[str]:
    """Parse a JSON list of names; raises `DataError` with its URL if it is malformed."""
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


def _check_path(path: str, url: str) -> None:
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or not path.endswith(".tar"):
        raise DataError(
            f"the manifest of {url} lists shard {path!r}, which is outside of the dataset"
        )


def _fetch_sidecars(records: Sequence[ShardRecord], root: Path, folder: RemoteFolder) -> None:
    """Copy index and columns of all shards to `root`, once per node."""
    wanted = []
    for record in records:
        index, columns = index_path(Path(record.path)), columns_path(Path(record.path))
        wanted += [(index, record.index_sha256), (columns, record.columns_sha256)]

    def fetch(entry: tuple[Path, str]) -> None:
        name, sha256 = entry
        content = folder.read(name.as_posix())
        if sha256_bytes(content) != sha256:
            raise DataError(
                f"the SHA-256 of {folder.url_of(name.as_posix())} does not match the manifest; copy the "
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
    """Synchronize the masks in `root` with the remote dataset, whose masks can change."""
    listing = folder.read_if_present(MASK_LISTING_NAME)
    if listing is None:
        found = folder.files_in(MASK_FOLDER)
        names = [name.removesuffix(".json") for name in found if name.endswith(".json")]
    else:
        names = parse_listing(listing, folder, MASK_LISTING_NAME)
    contents = {}
    for name in names:
        for file in (f"{name}.npy", f"{name}.json"):  # a mask takes effect with its .json
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
