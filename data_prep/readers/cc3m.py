"""Conceptual Captions, or any TSV of captions and images, with or without a header.

CC3M has lines `caption<TAB>url` and CC12M `url<TAB>caption`; the first row shows the order. Images are
local files: the image column (`train/00001.jpg`) or the last component of the URL, below `--media` or
the table's folder. Group: the URL, else the image's file name.
"""

from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from data_prep.corpus import Item, Problem, declared_split, require_file
from data_prep.options import ReaderOptions
from data_prep.readers.opening import bounded_lines, open_text, plain_name
from data_prep.readers.rows import Row, image_item
from data_prep.readers.text_files import read_delimited
from muomni.data.media.formats import IMAGE_FILES
from muomni.errors import DataError

_HEADERS = {
    "caption": ("caption", "title", "text"),
    "image": ("image", "filepath", "file", "path", "filename"),
    "url": ("url", "link"),
}


def read_cc3m(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the rows of a TSV; raises `DataError` if its columns are not recognized."""
    require_file(src, "caption table")
    names, has_header = _columns(src)
    root = options.media_root or src.parent
    rows = read_delimited(src, "\t", None if has_header else names, has_quotes=False)
    for number, record in rows:
        name, source = f"{plain_name(src.name)}-{number:08d}", f"{src.name} row {number}"
        if isinstance(record, Problem):
            yield image_item(Row(name, source, {}, record), root)
            continue
        values = dict(zip(names, record.values(), strict=True))
        url = str(values.get("url") or "").strip()
        values.setdefault("image", unquote(urlsplit(url).path.rpartition("/")[2]))
        values["split"] = declared_split(src.name)
        values["group"] = f"url:{url}" if url else ""
        yield image_item(Row(name, source, values, metadata={"url": url}), root)


def _columns(src: Path) -> tuple[list[str], bool]:
    """Our names of the columns, and whether the first row is a header."""
    with open_text(src) as file:
        fields = next(bounded_lines(file, src), "").rstrip("\r\n").split("\t")
    by_header = [
        next((ours for ours, theirs in _HEADERS.items() if field.strip().lower() in theirs), "")
        for field in fields
    ]
    names = by_header if any(by_header) else [_kind(field) for field in fields]
    names = [name or f"column {number}" for number, name in enumerate(names)]
    if names.count("caption") != 1 or not {"image", "url"} & set(names):
        raise DataError(
            f"the first row of {src} is not a caption and an image file or URL, separated by a tab; "
            "use --format tsv with --columns for other tables"
        )
    return names, any(by_header)


def _kind(field: str) -> str:
    field = field.strip()
    if field.startswith(("http://", "https://")):
        return "url"
    is_file = field.lower().endswith(tuple(f".{extension}" for extension in IMAGE_FILES))
    return "image" if is_file and " " not in field else "caption"
