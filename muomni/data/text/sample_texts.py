"""The texts of a stored sample: its document, transcript, or captions.

Shards of `data_prep` have the text in `.txt`, and all captions of an image in `.json`. Adopted tars may have it
in another member, such as `.caption`, or in the field "text" of `.json`.
"""

import json
from collections.abc import Mapping
from typing import Any

from muomni.errors import DataError

# Members that hold the text of a sample, the preferred one first.
TEXT_MEMBERS = ("txt", "text", "caption", "transcript", "lab")


def sample_text(sample: Mapping[str, Any]) -> str:
    """The document or transcript of a sample; raises `DataError` if it is missing or not UTF-8."""
    for name in TEXT_MEMBERS:
        if name in sample:
            return _decoded(sample, name)
    text = _json_field(sample, "text")
    if isinstance(text, str):
        return text.strip()
    if text is not None:
        raise DataError(f"{_key(sample)}: field 'text' of its .json is not a text")
    names = ", ".join(name for name in sample if name != "__key__")
    raise DataError(
        f"{_key(sample)} has no text (.txt, or 'text' in .json), its members are: {names}"
    )


def sample_captions(sample: Mapping[str, Any]) -> list[str]:
    """All captions of an image, at least one; raises `DataError` if there is none or one is not a text."""
    found = _json_field(sample, "captions")
    if found is None or found == []:
        caption = (
            None if any(name in sample for name in TEXT_MEMBERS) else _json_field(sample, "caption")
        )
        found = sample_text(sample) if caption is None else caption
    captions = found if isinstance(found, list) else [found]
    for caption in captions:
        if not isinstance(caption, str):
            fields = f" with fields {', '.join(caption)}" if isinstance(caption, dict) else ""
            raise DataError(
                f"{_key(sample)}: a caption of its .json is of type {type(caption).__name__}{fields}, not text"
            )
    return captions


def _decoded(sample: Mapping[str, Any], name: str) -> str:
    try:
        return sample[name].decode("utf-8")
    except UnicodeDecodeError:
        raise DataError(f"{_key(sample)}: its .{name} is not UTF-8") from None


def _json_field(sample: Mapping[str, Any], field: str) -> Any:
    """A field of the `.json` member; None without one. Raises `DataError` if it is not a JSON object."""
    if "json" not in sample:
        return None
    try:
        content = json.loads(sample["json"])
    except (ValueError, RecursionError) as error:
        raise DataError(f"{_key(sample)}: its .json is not JSON ({error})") from None
    if not isinstance(content, dict):
        raise DataError(f"{_key(sample)}: its .json is not a JSON object")
    return content.get(field)


def _key(sample: Mapping[str, Any]) -> str:
    return f"sample {sample.get('__key__')!r}"
