"""SHA-256 of files and bytes, as lower-case hex."""

import hashlib
from pathlib import Path

_BLOCK_BYTES = 1 << 20


def sha256_file(path: Path | str) -> str:
    """SHA-256 of a file, read one block at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of bytes in memory."""
    return hashlib.sha256(data).hexdigest()
