"""Opens the datasets and the tokenizer of a run's data root, local or at a URL.

Object stores list the folders of a data root. HTTP has no listing, so `datasets.json` in the data root
lists them (`["text", "asr"]`).
"""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from muomni.config.run import DataSection
from muomni.data.shards.manifest import MANIFEST_NAME, Manifest, Origin, Task, find_datasets
from muomni.data.shards.remote import parse_listing
from muomni.data.text.tokenizer import Tokenizer
from muomni.errors import DataError
from muomni.io.remote_folder import RemoteFolder, is_url

TOKENIZER_NAME = "tokenizer.model"
LISTING_NAME = "datasets.json"
_NUM_THREADS = 16


def open_datasets(data: DataSection, tasks: Sequence[Task]) -> list[Manifest]:
    """The datasets of each task in `data.root`, sorted by name within a task.

    Raises `DataError` if a task has none.
    """
    if not is_url(data.root):
        return [found for task in tasks for found in find_datasets(data.root, task)]
    folder = RemoteFolder(data.root, data.storage_options)
    manifests = _find_remote_datasets(folder, cache_folder(data), int(data.cache_gb * 1e9))
    return [found for task in tasks for found in _of_task(manifests, task, data.root)]


def open_tokenizer(data: DataSection) -> Tokenizer:
    """The tokenizer at `data.tokenizer`, by default that of the data root; raises `DataError`."""
    if data.tokenizer is not None and not is_url(data.tokenizer):
        return Tokenizer.load(data.tokenizer)
    if data.tokenizer is None and not is_url(data.root):
        return Tokenizer.load(Path(data.root) / TOKENIZER_NAME)
    url = data.tokenizer or f"{data.root.rstrip('/')}/{TOKENIZER_NAME}"
    parent, _, name = url.rpartition("/")
    return Tokenizer(RemoteFolder(parent, data.storage_options).read(name), url)


def cache_folder(data: DataSection) -> Path:
    """The cache of remote shards: `data.cache_dir`, or `muomni` in the user's cache folder."""
    if data.cache_dir is not None:
        return Path(data.cache_dir).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "muomni"


def _find_remote_datasets(folder: RemoteFolder, cache: Path, max_bytes: int) -> list[Manifest]:
    """The datasets in a folder and its direct subfolders, sorted by name.

    Raises `DataError` if there is none or a manifest is malformed.
    """
    listing = folder.read_if_present(LISTING_NAME)
    names = folder.folders() if listing is None else parse_listing(listing, folder, LISTING_NAME)
    folders = [folder, *(folder.inside(name) for name in names)]
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        contents = list(pool.map(lambda each: each.read_if_present(MANIFEST_NAME), folders))
    found = []
    for each, content in zip(folders, contents, strict=True):
        if content is not None:
            found.append(_parse(content, Origin(each, cache, max_bytes)))
        elif listing is not None and each is not folder:
            raise DataError(
                f"{each.url} has no {MANIFEST_NAME}, but {folder.url_of(LISTING_NAME)} lists it; "
                "correct the listing or copy the dataset there"
            )
    if not found:
        raise DataError(
            f"{folder.url} has no dataset: there is no {MANIFEST_NAME} in it or in a direct subfolder; "
            f'over HTTP, {LISTING_NAME} must list the subfolders, as in ["text"]'
        )
    return sorted(found, key=lambda manifest: (manifest.name, manifest.location))


def _of_task(manifests: Sequence[Manifest], task: Task, url: str) -> list[Manifest]:
    """The datasets of one task; raises `DataError` if there is none."""
    found = [manifest for manifest in manifests if manifest.task == task]
    if not found:
        tasks = ", ".join(sorted({manifest.task for manifest in manifests}))
        raise DataError(f"{url} has no dataset of task {task!r}, only of {tasks}")
    return found


def _parse(content: bytes, origin: Origin) -> Manifest:
    url = origin.folder.url_of(MANIFEST_NAME)
    manifest = Manifest.parse(content, origin.cache_dir, url)
    # `parse` recomputed the fingerprint, so it is safe as a file name.
    root = origin.cache_dir / "datasets" / manifest.fingerprint
    return manifest.model_copy(update={"root": root, "origin": origin})
