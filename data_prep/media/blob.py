"""Read an image or audio clip that a JSON record holds in base64."""

import base64
import binascii

from data_prep.corpus import BAD_RECORD, MISSING_MEDIA, BadSampleError, Blob

_FROM_URL_SAFE = bytes.maketrans(b"-_", b"+/")


def read_blob(blob: Blob) -> bytes:
    """The bytes of a file inside of a record.

    Raises `BadSampleError` if the JSON file no longer exists or the text is not base64.
    """
    text = blob.held.encode()
    try:
        if not text:
            with open(blob.path, "rb") as file:
                file.seek(blob.start)
                text = file.read(blob.end - blob.start)
    except OSError as error:
        raise BadSampleError(MISSING_MEDIA, f"cannot read {blob.path}: {error.strerror}") from error
    # JSON may write / as \/, and URL-safe base64 has - and _.
    text = b"".join(text.replace(b"\\", b"").translate(_FROM_URL_SAFE).split()).rstrip(b"=")
    try:
        return base64.b64decode(text + b"=" * (-len(text) % 4), validate=True)
    except binascii.Error as error:
        raise BadSampleError(BAD_RECORD, f"{blob} is not valid base64: {error}") from error
