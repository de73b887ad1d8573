"""Finds the datasets that a command line names, and parts them by shard."""

from pathlib import Path

from muomni.data.shards.manifest import MANIFEST_NAME, Manifest, Split


def find_manifests(folders: list[Path]) -> list[Manifest]:
    """The datasets in the given folders or directly below them.

    Raises `DataError` for a folder without any.
    """
    found = []
    for folder in folders:
        inside = sorted(folder.glob(f"*/{MANIFEST_NAME}"))
        if (folder / MANIFEST_NAME).is_file() or not inside:
            found.append(Manifest.load(folder))
        else:
            found += [Manifest.load(path.parent) for path in inside]
    return found


def by_shard(manifest: Manifest) -> list[Manifest]:
    """A manifest a shard, that lists this shard only: to read shards in several processes.

    A process then gets and checks no more than its own shard, however many there are.
    """
    return [
        manifest.model_copy(update={"splits": {name: Split(shards=(shard,))}})
        for name, split in manifest.splits.items()
        for shard in split.shards
    ]
