"""A folder at a URL (s3://, gs://, http://, hf://, memory://, ...), read through fsspec with retries.

Credentials and endpoints come from fsspec's sources: the environment variables of each back end and
`~/.config/fsspec`. Reads are retried with exponential backoff; a permanent failure raises a `DataError`
that names the URL.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from muomni.errors import ConfigError, DataError, MachineError

_MAX_WAIT_S = 30.0
# The extra of `pip install 'muomni[EXTRA]'` for each protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}
_REFUSALS = (401, 403)


def is_url(location: Path | str) -> bool:
    """Whether a location is a URL rather than a local path."""
    return "://" in str(location)


@dataclass(frozen=True)
class RemoteFolder:
    """Files below `url`, addressed by relative names. Picklable.

    `storage_options` are arguments of the fsspec file system. A read is tried up to `num_attempts` times;
    the first wait is `first_wait_s`, and each further wait is twice as long.
    """

    url: str
    storage_options: dict[str, Any] = field(default_factory=dict)
    num_attempts: int = 6
    first_wait_s: float = 0.5

    def url_of(self, name: str) -> str:
        """The URL of a file in the folder."""
        return f"{self.url.rstrip('/')}/{name}"

    def inside(self, name: str) -> "RemoteFolder":
        """The direct subfolder `name`."""
        return RemoteFolder(
            self.url_of(name), self.storage_options, self.num_attempts, self.first_wait_s
        )

    def read(self, name: str) -> bytes:
        """Read a file; raises `DataError` if it is missing or cannot be read."""
        content = self.read_if_present(name)
        if content is None:
            raise DataError(f"{self.url_of(name)} is missing; copy the dataset there again")
        return content

    def read_if_present(self, name: str) -> bytes | None:
        """Read a file, or return None if it is missing; raises `DataError` if it cannot be read."""
        path = self._path_of(name)
        return self._attempt(name, lambda: self._files.cat_file(path))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """Read bytes [start, end), or to the end of the file if the server ignores ranges; at least one.

        Raises `DataError` if they cannot be read.
        """

        def read() -> bytes:
            content = self._files.cat_file(self._path_of(name), start=start, end=end)
            # A server without ranges sends the file from the start.
            content = content[start:] if len(content) > end - start else content
            if not content:
                raise EOFError(f"the file ends before byte {start}")
            return content

        content = self._attempt(name, read)
        if content is None:
            raise DataError(f"{self.url_of(name)} is missing; copy the dataset there again")
        return content

    def folders(self) -> list[str]:
        """Names of the direct subfolders, sorted; empty if the back end has no listing."""
        return self._listed("", "directory")

    def files_in(self, name: str) -> list[str]:
        """Names of the files in a subfolder, sorted; empty if it is missing or cannot be listed."""
        return self._listed(name, "file")

    def _listed(self, name: str, kind: str) -> list[str]:
        if self._protocols & {"http", "https"}:
            return []  # an HTML page is not a reliable listing
        path = self._path_of(name)
        entries = self._attempt(name, lambda: self._files.ls(path, detail=True, refresh=True)) or []
        paths = [entry["name"].rstrip("/") for entry in entries if entry["type"] == kind]
        return sorted(path.rpartition("/")[2] for path in paths)

    @cached_property
    def _opened(self) -> tuple[Any, str]:
        """The fsspec file system and the folder's path in it."""
        import fsspec

        protocol = self.url.partition("://")[0]
        try:
            return fsspec.url_to_fs(self.url.rstrip("/"), **self.storage_options)
        except ImportError as error:
            extra = _EXTRAS.get(protocol)
            advice = f"run pip install 'muomni[{extra}]'" if extra else str(error)
            raise MachineError(
                f"{self.url} needs a package that is not installed: {advice}"
            ) from error
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"cannot open {self.url} ({error}); check the URL and data.storage_options"
            ) from error

    @property
    def _files(self) -> Any:
        return self._opened[0]

    @property
    def _protocols(self) -> set[str]:
        protocol = self._files.protocol
        return {protocol} if isinstance(protocol, str) else set(protocol)

    def _path_of(self, name: str) -> str:
        return f"{self._opened[1].rstrip('/')}/{name}" if name else self._opened[1]

    def _attempt(self, name: str, call: Callable[[], Any]) -> Any:
        """The result of `call` with retries, or None if the file does not exist."""
        attempt = 0
        while True:
            try:
                return call()
            except FileNotFoundError:
                return None
            except Exception as error:  # back ends raise errors of their libraries
                attempt += 1
                if attempt == self.num_attempts or _is_refusal(error):
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    raise DataError(
                        f"cannot read {self.url_of(name)} ({reason}); check URL, credentials, and network, "
                        "then rerun: completed downloads are kept"
                    ) from error
            time.sleep(min(self.first_wait_s * 2 ** (attempt - 1), _MAX_WAIT_S))


def _is_refusal(error: Exception) -> bool:
    """Whether the server denies access, so that a retry is pointless."""
    return isinstance(error, PermissionError) or getattr(error, "status", 0) in _REFUSALS
