"""Plain text files: each line, paragraph (separated by blank lines), or file is a document.

Only byte ranges are kept, so a corpus may exceed memory. Group: the words of the document, so repeated
lines stay together.
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import BAD_UTF8, Item, Problem, TextSpan, clean_key, text_group
from data_prep.options import ReaderOptions
from data_prep.readers.text_files import BOM, require_utf8
from muomni.errors import DataError

DOCUMENTS = ("line", "paragraph", "file")


def read_plain_text(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the documents of a text file, or of all *.txt files below a folder.

    Raises `DataError` if there is no file.
    """
    if not src.exists():
        raise DataError(f"text source {src} does not exist; check --src")
    files = [src] if src.is_file() else sorted(src.rglob("*.txt"))
    if not files:
        raise DataError(f"{src} contains no *.txt file; check --src")
    root = src.parent if src.is_file() else src
    for path in files:
        name = str(path.relative_to(root).with_suffix(""))
        for number, (start, content) in enumerate(_documents(path, options.document), start=1):
            yield _item(path, name, number, start, content, options.document)


def _documents(path: Path, document: str) -> Iterator[tuple[int, bytes]]:
    """Byte offset and content of each non-empty document."""
    require_utf8(path)
    with path.open("rb") as file:
        # A byte order mark is not part of the first document.
        if file.read(len(BOM)) != BOM:
            file.seek(0)
        start = position = file.tell()
        if document == "file":
            content = file.read()
            if content.strip():
                yield start, content
            return
        paragraph: list[bytes] = []
        for line in file:
            if document == "line":
                if line.strip():
                    yield position, line.rstrip(b"\r\n")
            elif line.strip():
                start = start if paragraph else position
                paragraph.append(line)
            elif paragraph:
                yield start, b"".join(paragraph).rstrip(b"\r\n")
                paragraph = []
            position += len(line)
        if paragraph:
            yield start, b"".join(paragraph).rstrip(b"\r\n")


def _item(path: Path, name: str, number: int, start: int, content: bytes, document: str) -> Item:
    problem = None
    try:
        content.decode()
    except UnicodeDecodeError as error:
        message = f"byte {start + error.start} of {path.name} is not valid UTF-8"
        problem = Problem(BAD_UTF8, message)
    return Item(
        key=clean_key(f"{name}-{number:08d}"),
        group=text_group(content.decode(errors="surrogateescape")),
        source=f"{path.name} {document} {number}",
        span=TextSpan(str(path), start, start + len(content)),
        problem=problem,
    )
