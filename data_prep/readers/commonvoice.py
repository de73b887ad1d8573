"""Common Voice: the folder of a language, with `train.tsv`, `dev.tsv`, `test.tsv`, and `clips/`.

`validated.tsv` is read if those are missing, or with `--subsets validated`. Group: the words of the
sentence, or with `--group speaker` the speaker (`client_id`).
"""

from collections.abc import Iterator
from pathlib import Path

from data_prep.corpus import Item, Problem, declared_split, require_file, require_folder
from data_prep.options import ReaderOptions
from data_prep.readers.rows import Row, speech_item
from data_prep.readers.text_files import read_delimited, require_columns
from muomni.errors import DataError

_DECLARED = ("train", "dev", "test")
_FACTS = ("gender", "age", "accents")


def read_commonvoice(src: Path, options: ReaderOptions) -> Iterator[Item]:
    """List the clips of the tables; a clip in several tables keeps the split of the first.

    Raises `DataError` if a table or the folder of clips is missing.
    """
    subsets = options.subsets or tuple(s for s in _DECLARED if (src / f"{s}.tsv").is_file())
    if not subsets and not (src / "validated.tsv").is_file():
        raise DataError(
            f"{src} contains neither train.tsv nor validated.tsv; --src must be the folder of one "
            "language of Common Voice"
        )
    clips = options.media_root or require_folder(src / "clips", "Common Voice clips")
    seen: set[str] = set()
    for subset in subsets or ("validated",):
        table = require_file(src / f"{subset}.tsv", "Common Voice table")
        for row in _rows(table, declared_split(subset), src.name):
            if row.name not in seen:
                seen.add(row.name)
                yield speech_item(row, clips, options)


def _rows(table: Path, split: str | None, language: str) -> Iterator[Row]:
    # Sentences may contain unpaired quotation marks.
    for number, record in read_delimited(table, "\t", has_quotes=False):
        source = f"{table.name} row {number}"
        if isinstance(record, Problem):
            yield Row(f"{table.stem}-{number:08d}", source, {}, record)
            continue
        require_columns(table, tuple(record), ("client_id", "path", "sentence"))
        path = str(record["path"])
        # File names have no extension in the first releases.
        audio = path if not path or Path(path).suffix else f"{path}.mp3"
        values: dict[str, object] = {
            "audio": audio,
            "text": record["sentence"],
            "speaker": record["client_id"],
            "language": record.get("locale") or language,
            "split": split,
        }
        facts = {name: str(record.get(name) or "") for name in _FACTS}
        yield Row(Path(audio).stem or source, source, values, metadata=facts)
