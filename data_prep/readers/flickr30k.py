"""Flickr30k: five captions per image, in one of two tables beside the image folder.

`results_20130124.token` has lines `IMAGE.jpg#N<TAB>caption`; `results.csv` has the columns
`image_name| comment_number| comment`. All captions of an image form one sample. Group: the image's file
name.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import BAD_RECORD, Item, Problem
from data_prep.options import ReaderOptions
from data_prep.readers.opening import bounded_lines, open_text
from data_prep.readers.rows import Row, image_item
from data_prep.readers.text_files import read_delimited
from data_prep.values import shown
from muomni.errors import DataError

_TABLES = ("results_20130124.token", "results.csv")
_FOLDERS = ("flickr30k-images", "flickr30k_images", "images", "Images")


def read_flickr30k(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the images of a table, or of the table in SRC or its subfolders.

    Images are in `media_root` or beside the table. Raises `DataError` if the table or the image folder is
    missing.
    """
    table = src if src.is_file() else _find_table(src)
    root = options.media_root or _image_folder(table.parent)
    captions: dict[str, list[str]] = {}
    for number, image, caption in _lines(table):
        if image:
            captions.setdefault(image, []).append(caption)
            continue
        problem = Problem(BAD_RECORD, f"the line is not image, number, and caption: {caption}")
        source = f"{table.name} line {number}"
        yield image_item(Row(f"{table.stem}-{number:08d}", source, {}, problem), root)
    for image, texts in captions.items():
        values: dict[str, object] = {"id": Path(image).stem, "image": image, "caption": texts}
        yield image_item(Row(image, f"{table.name} image {image}", values), root)


def _find_table(src: Path) -> Path:
    for pattern in (*_TABLES, *(f"*/{name}" for name in _TABLES)):
        found = sorted(src.glob(pattern))
        if found:
            return found[0]
    raise DataError(
        f"{src} contains neither {_TABLES[0]} nor {_TABLES[1]}; --src must be the folder or the table"
    )


def _image_folder(beside: Path) -> Path:
    """The image folder beside a table, or the table's own folder if it contains images."""
    named = [beside / name for name in _FOLDERS if (beside / name).is_dir()]
    if named:
        return named[0]
    if next(beside.glob("*.jpg"), None) is None:
        raise DataError(f"no image folder {_FOLDERS[0]} in {beside}; set it with --media")
    return beside


def _lines(table: Path) -> Iterator[tuple[int, str, str]]:
    """Line number, image, and caption; a bad line has no image and its text as caption."""
    with open_text(table) as file:
        is_csv = "|" in next(bounded_lines(file, table), "").partition("\t")[0]
    names = ["image", "number", "caption"] if is_csv else ["image", "caption"]
    header = None if is_csv else names
    rows = read_delimited(table, "|" if is_csv else "\t", header, has_quotes=False)
    for number, row in rows:
        line = number + is_csv
        if isinstance(row, Problem):
            yield line, "", row.message
            continue
        fields = [str(value) for value in row.values()]
        image = fields[0].strip().partition("#")[0]
        yield line, image, fields[-1].strip() if image else shown(fields)
