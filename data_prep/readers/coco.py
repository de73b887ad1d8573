"""COCO captions: `annotations/captions_SUBSET.json` beside the image folder `SUBSET/`; also Karpathy's JSON.

All captions of an image form one sample. Group: the image's file name. An image may have a "type", by which
metrics are reported, too, and a "split". Ids may be numbers or texts. Karpathy's `dataset_NAME.json` has the
captions of an image as its "sentences"; its split `restval` is train.
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
    recorded_split,
    text_problem,
    type_of,
)
from data_prep.options import ReaderOptions
from data_prep.readers.coco_files import AnnotationFile, annotation_files
from data_prep.readers.text_files import Record, read_json
from data_prep.values import name_value, shown, texts_value
from muomni.errors import DataError

# Id of an image, its record, its file name, and its captions.
_Sample = tuple[str, Record, str, list[object]]


def read_coco(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the images of all `captions_*.json` in SRC/annotations, or of SRC if it is a file.

    `options.annotations` is a file pattern in that folder. Raises `DataError` if no file matches or one is
    not a COCO or Karpathy file with captions.
    """
    seen: dict[str, str] = {}
    for file in annotation_files(src, options):
        content = read_json(file.path, "COCO annotation")
        images = content.get("images") if isinstance(content, dict) else None
        if not isinstance(content, dict) or not isinstance(images, list):
            raise DataError(f"{file.path} is not a COCO annotation file: it has no list 'images'")
        if any(isinstance(image, dict) and "sentences" in image for image in images):
            samples = _karpathy_samples(images, file)
        else:
            samples = _samples(content, images, file)
        for sample in samples:
            yield sample if isinstance(sample, Item) else _item(*sample, file, seen)


def _samples(content: dict, images: list, file: AnnotationFile) -> Iterator[Item | _Sample]:
    """The images; items for what is broken."""
    path = file.path
    annotations = content.get("annotations")
    if not isinstance(annotations, list):
        raise DataError(f"{path} is not a COCO annotation file: it has no list 'annotations'")
    if annotations and not any(isinstance(a, dict) and "caption" in a for a in annotations):
        fields = ", ".join(annotations[0]) if isinstance(annotations[0], dict) else "no fields"
        raise DataError(
            f"{path} has no captions (its annotations have {shown(fields)[1:-1]}); select files with "
            "captions by --annotations"
        )
    captions: dict[str, list[object]] = {}
    for annotation in annotations:
        image_id = _id(annotation, "image_id")
        if not image_id:
            yield _bad(path, "annotation", shown(annotation), BAD_RECORD, "has no image_id")
            continue
        captions.setdefault(image_id, []).append(annotation.get("caption"))
    names: dict[str, object] = {}
    for image in images:
        image_id = _id(image, "id")
        name = image.get("file_name") if isinstance(image, dict) else None
        if not image_id or not isinstance(name, str) or not name:
            yield _bad(path, "image", shown(image), BAD_RECORD, "has no id and file_name")
        elif image_id not in names:
            yield image_id, image, name, captions.pop(image_id, [])
        elif names[image_id] != name:
            message = f"is listed as {shown(names[image_id])} and as {shown(name)}"
            yield _bad(path, "image", f"{image_id} {name}", BAD_RECORD, message)
        names.setdefault(image_id, name)
    for image_id in captions:
        message = "has captions but is not in the list of images"
        yield _bad(path, "image", image_id, CAPTION_WITHOUT_IMAGE, message)


def _karpathy_samples(images: list, file: AnnotationFile) -> Iterator[Item | _Sample]:
    """As `_samples`; the image folder of a COCO image is its `filepath`."""
    for number, image in enumerate(images):
        name = image.get("filename") if isinstance(image, dict) else None
        sentences = image.get("sentences") if isinstance(image, dict) else None
        if not isinstance(name, str) or not name or not isinstance(sentences, list):
            message = "has no filename and sentences"
            yield _bad(file.path, "image", f"{number} {shown(image)}", BAD_RECORD, message)
            continue
        folder = image.get("filepath")
        captions: list[object] = [
            each.get("raw") if isinstance(each, dict) else each for each in sentences
        ]
        image_id = next((i for key in ("cocoid", "imgid") if (i := _id(image, key))), str(number))
        yield image_id, image, f"{folder}/{name}" if folder else name, captions


def _id(record: object, field: str) -> str:
    """1, 1.0, and "1" are the same id; empty if it is missing."""
    try:
        return name_value(record.get(field), field) if isinstance(record, dict) else ""
    except BadSampleError:
        return ""


def _item(
    image_id: str,
    image: Record,
    name: str,
    captions: list[object],
    file: AnnotationFile,
    seen: dict[str, str],
) -> Item:
    problem, split, texts = None, None, list[str]()
    metadata = {"image_id": image_id}
    media: tuple[str, ...] = ()
    try:
        split = recorded_split(image) or declared_split(file.subset) or declared_split(name)
        metadata |= type_of(image)
        texts = texts_value(captions, "caption")
        problem = next((p for p in map(_caption_problem, texts) if p), None)
        media = (file.image(name),)
    except BadSampleError as error:
        problem = error.problem
    texts = [" ".join(text.split()) for text in texts if text.strip()]
    if problem is None and not texts:
        problem = Problem(EMPTY_TEXT, "the image has no caption")
    key = clean_key(Path(name).stem)
    if seen.setdefault(key, f"{file.path.name}:{name}") != f"{file.path.name}:{name}":
        # Images of two subsets may have the same name.
        key = clean_key(f"{file.path.stem}/{name}")
    return Item(
        key=key,
        group=image_group(name),
        source=f"{file.path.name} image {image_id}",
        declared_split=split,
        texts=() if problem else tuple(texts),
        media=media,
        metadata=metadata,
        problem=problem,
    )


def _caption_problem(caption: str) -> Problem | None:
    problem = text_problem(caption, "the caption")
    return None if problem is None or problem.reason == EMPTY_TEXT else problem


def _bad(path: Path, what: str, name: str, reason: str, message: str) -> Item:
    return Item(
        key=clean_key(f"{path.stem}-{what}-{name}"),
        group=f"{path.stem}:{name}",
        source=f"{path.name} {what} {name}",
        problem=Problem(reason, f"{what} {name} {message}"),
    )
