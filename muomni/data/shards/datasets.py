"""Opens the datasets and the tokenizer of a run's data root, local or at a URL."""

import os
from collections.abc import Sequence
from pathlib import Path

from muomni.config.run import DataSection
from muomni.data.shards.manifest import Manifest, Task, find_datasets
from muomni.data.shards.remote import find_remote_datasets, of_task
from muomni.data.text.tokenizer import Tokenizer
from muomni.io.remote_folder import RemoteFolder, is_url

TOKENIZER_NAME = "tokenizer.model"


def open_datasets(data: DataSection, tasks: Sequence[Task]) -> list[Manifest]:
    """The datasets of each task in `data.root`, sorted by name within a task.

    Raises `DataError` if a task has none.
    """
    if not is_url(data.root):
        return [found for task in tasks for found in find_datasets(data.root, task)]
    folder = RemoteFolder(data.root, data.storage_options)
    manifests = find_remote_datasets(folder, cache_folder(data), int(data.cache_gb * 1e9))
    return [found for task in tasks for found in of_task(manifests, task, data.root)]


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
