"""Folders of images beside their texts: `a/b/cat.jpg` and `a/b/cat.txt` or `.caption`.

`folder` reads any depth; each line of a text is a caption. `img2dataset` reads that tool's output format
`files`: folders of KEY.jpg, KEY.txt, and KEY.json, which contains the URL.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import CAPTION_WITHOUT_IMAGE, Item, Problem, declared_split, require_folder
from data_prep.options import ReaderOptions
from data_prep.readers.rows import Row, image_item
from data_prep.readers.text_files import read_text
from data_prep.readers.walk import walk
from muomni.data.media.formats import IMAGE_EXTENSIONS, IMAGE_FILES
from muomni.errors import DataError

_TEXTS = (".txt", ".caption")
_IMAGES = tuple(f".{extension}" for extension in IMAGE_FILES)


def read_image_folder(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List all images below SRC; the first folder of a path may declare a split, such as `train`.

    Raises `DataError` if there is no image.
    """
    nothing = f"{src} contains no image ({', '.join(IMAGE_EXTENSIONS)})"
    for row in _rows(src, nothing, _TEXTS, options):
        folder, slash, _ = row.name.partition("/")
        row.values["caption"] = row.text("caption").splitlines()
        row.values["split"] = declared_split(folder) if slash else None
        yield image_item(row, src)


def read_img2dataset(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the downloaded images; raises `DataError` for other output formats of the tool."""
    nothing = f"{src} contains no KEY.jpg of img2dataset (--output_format files)"
    if src.is_dir() and next(src.glob("*.tar"), None) is not None:
        nothing = (
            f"{src} contains img2dataset's webdataset output, which needs no conversion: run "
            f"'python -m data_prep index {src} --task image-caption'"
        )
    for row in _rows(src, nothing, (*_TEXTS, ".json"), options):
        facts = _facts(src / f"{row.name}.json")
        url = facts.get("url")
        url = url if isinstance(url, str) else ""
        row.metadata["url"] = url
        row.values["id"] = Path(row.name).name
        # Keys are numbers within a download, so they do not identify images.
        row.values["group"] = f"url:{url}" if url else f"{src.name}:{row.name}"
        row.values["caption"] = row.text("caption") or facts.get("caption")
        yield image_item(row, src)


def _rows(
    src: Path, nothing: str, side_files: tuple[str, ...], options: ReaderOptions
) -> Iterator[Row]:
    """A row for each image and each text without image, named by its path without extension.

    Files that are neither images nor `side_files` are counted. Raises `DataError` with the message
    `nothing` if there is no image.
    """
    require_folder(src, "image folder")
    num_images = 0
    for folder, names in walk(src, options.skipped):
        relative = folder.relative_to(src)
        texts = {Path(name).stem: name for name in names if name.lower().endswith(_TEXTS)}
        images = [name for name in names if name.lower().endswith(_IMAGES)]
        num_images += len(images)
        for name in names:
            if not name.lower().endswith((*_IMAGES, *side_files)):
                options.skipped.add_other(name)
        for name in images:
            stem = Path(name).stem
            text = texts.get(stem)
            caption = read_text(folder / text) if text else ""
            values: dict[str, object] = {"image": str(relative / name), "caption": caption}
            yield Row((relative / stem).as_posix(), str(relative / name), values)
        for stem in sorted(texts.keys() - {Path(name).stem for name in images}):
            source = str(relative / texts[stem])
            problem = Problem(CAPTION_WITHOUT_IMAGE, f"{source} has no image beside it")
            yield Row((relative / stem).as_posix(), source, {"image": stem}, problem)
    if not num_images:
        report = options.skipped.report()
        raise DataError(f"{nothing}{report and f' ({report})'}; check --src")


def _facts(path: Path) -> dict[str, object]:
    """The metadata of img2dataset about an image; empty if the file is missing or broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
