"""COCO captions: `annotations/captions_SUBSET.json` beside the image folder `SUBSET/`.

All captions of an image form one sample. Group: the image's file name. An image may have a "type", by which
metrics are reported, too.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import (
    BAD_RECORD,
    CAPTION_WITHOUT_IMAGE,
    EMPTY_TEXT,
    BadSampleError,
    Item,
    Problem,
    clean_key,
    declared_split,
    image_group,
    require_folder,
    text_problem,
    type_of,
)
from data_prep.options import ReaderOptions
from data_prep.readers.text_files import read_json
from muomni.errors import DataError

_PREFIX = "captions_"


def read_coco(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the images of all `captions_*.json` in SRC/annotations that have an image folder.

    `options.annotations` is a file pattern in that folder. Raises `DataError` if no file matches or one is
    not a COCO annotation file.
    """
    folder = require_folder(src / "annotations", "COCO annotation folder")
    pattern = options.annotations or f"{_PREFIX}*.json"
    pairs = [
        (path, images)
        for path in sorted(folder.glob(pattern))
        if (images := _image_folder(src, path)) is not None
        and (options.annotations or images.name == path.stem.removeprefix(_PREFIX))
    ]
    if not pairs:
        raise DataError(
            f"no annotation file {folder}/{pattern} has a matching image folder beside 'annotations'; "
            "check --src and --annotations"
        )
    for path, images in pairs:
        yield from _read_subset(path, images)


def _image_folder(src: Path, annotation: Path) -> Path | None:
    """`SRC/train2017` for captions_train2017.json and captions_train2017_fr.json."""
    name = annotation.stem.removeprefix(_PREFIX)
    while name:
        if (src / name).is_dir():
            return src / name
        name = name.rpartition("_")[0]
    return None


def _read_subset(path: Path, images: Path) -> Iterator[Item]:
    content = _load(path)
    captions: dict[int | str, list[str]] = {}
    for annotation in content["annotations"]:
        if not isinstance(annotation, dict) or not _is_id(annotation.get("image_id")):
            yield _bad(path, "annotation", str(annotation)[:80], BAD_RECORD, "has no image_id")
            continue
        captions.setdefault(annotation["image_id"], []).append(str(annotation.get("caption", "")))
    for image in content["images"]:
        if not isinstance(image, dict) or not (_is_id(image.get("id")) and image.get("file_name")):
            yield _bad(path, "image", str(image)[:80], BAD_RECORD, "has no id and file_name")
            continue
        yield _item(path, images, image, captions.pop(image["id"], []))
    for image_id in captions:
        message = "has captions but is not in the list of images"
        yield _bad(path, "image", str(image_id), CAPTION_WITHOUT_IMAGE, message)


def _is_id(value: object) -> bool:
    return isinstance(value, int | str)


def _item(path: Path, images: Path, image: dict, captions: list[str]) -> Item:
    name = str(image["file_name"])
    problems = [text_problem(caption, "the caption") for caption in captions]
    problem = next((p for p in problems if p and p.reason != EMPTY_TEXT), None)
    texts = tuple(" ".join(caption.split()) for caption in captions if caption.strip())
    if problem is None and not texts:
        problem = Problem(EMPTY_TEXT, "the image has no caption")
    metadata = {"image_id": str(image["id"])}
    try:
        metadata |= type_of(image)
    except BadSampleError as error:
        problem = problem or error.problem
    return Item(
        key=clean_key(Path(name).stem),
        group=image_group(name),
        source=f"{path.name} image {image['id']}",
        declared_split=declared_split(images.name),
        texts=() if problem else texts,
        media=(str(images / name),),
        metadata=metadata,
        problem=problem,
    )


def _bad(path: Path, what: str, name: str, reason: str, message: str) -> Item:
    return Item(
        key=clean_key(f"{path.stem}-{what}-{name}"),
        group=f"{path.stem}:{name}",
        source=f"{path.name} {what} {name}",
        problem=Problem(reason, f"{what} {name} {message}"),
    )


def _load(path: Path) -> dict:
    content = read_json(path, "COCO annotation")
    for name in ("images", "annotations"):
        if not isinstance(content, dict) or not isinstance(content.get(name), list):
            raise DataError(f"{path} is not a COCO annotation file: it has no list {name!r}")
    return content
