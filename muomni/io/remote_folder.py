"""A folder at a URL (s3://, gs://, http://, hf://, memory://, ...), read through fsspec with retries.

Credentials and endpoints come from fsspec's own sources: the environment variables of each back-end
and `~/.config/fsspec`. What fails for a moment is tried again with growing pauses; what stays broken
becomes one `DataError` that names the URL.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from muomni.errors import ConfigError, DataError, MachineError

_MAX_WAIT_S = 30.0
# What `pip install 'muomni[EXTRA]'` adds for a protocol.
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "hf": "hf"}
_REFUSALS = (401, 403)


def is_url(place: Path | str) -> bool:
    """Whether a data root is a URL and no local path."""
    return "://" in str(place)


@dataclass(frozen=True)
class RemoteFolder:
    """Files below `url`, addressed by relative names; picklable.

    `storage_options` are the arguments of the fsspec file system. A read is tried `num_attempts`
    times, after pauses of `first_wait_s` and then twice as long each.
    """

    url: str
    storage_options: dict[str, Any] = field(default_factory=dict)
    num_attempts: int = 6
    first_wait_s: float = 0.5

    def url_of(self, name: str) -> str:
        """The URL of a file in the folder."""
        return f"{self.url.rstrip('/')}/{name}"

    def inside(self, name: str) -> "RemoteFolder":
        """A direct subfolder."""
        return RemoteFolder(
            self.url_of(name), self.storage_options, self.num_attempts, self.first_wait_s
        )

    def read(self, name: str) -> bytes:
        """The whole file; raises `DataError` when it is missing or cannot be read."""
        content = self.read_if_present(name)
        if content is None:
            raise DataError(f"{self.url_of(name)} is missing; copy the dataset there again")
        return content

    def read_if_present(self, name: str) -> bytes | None:
        """The whole file, None when there is none; raises `DataError` when it cannot be read."""
        path = self._path_of(name)
        return self._attempt(name, lambda: self._files.cat_file(path))

    def read_range(self, name: str, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`, or more where the server knows no ranges; at least one.

        Raises `DataError` when they cannot be read.
        """

        def read() -> bytes:
            content = self._files.cat_file(self._path_of(name), start=start, end=end)
            # A server without ranges sends the file from its beginning.
            content = content[start:] if len(content) > end - start else content
            if not content:
                raise EOFError(f"it ends before byte {start}")
            return content

        content = self._attempt(name, read)
        if content is None:
            raise DataError(f"{self.url_of(name)} is missing; copy the dataset there again")
        return content

    def folders(self) -> list[str]:
        """Names of the direct subfolders, sorted; empty where the back-end lists none."""
        return self._listed("", "directory")

    def files_in(self, name: str) -> list[str]:
        """Names of the files in a subfolder, sorted; empty without it and where none are listed."""
        return self._listed(name, "file")

    def _listed(self, name: str, kind: str) -> list[str]:
        if self._protocols & {"http", "https"}:
            return []  # an HTML page is no listing to rely on
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
                f"cannot open {self.url} ({error}); check the address and data.storage_options"
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
        """The result of `call`, None when the file does not exist."""
        attempt = 0
        while True:
            try:
                return call()
            except FileNotFoundError:
                return None
            except Exception as error:  # back-ends raise errors of their own libraries
                attempt += 1
                if attempt == self.num_attempts or _is_refusal(error):
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    raise DataError(
                        f"cannot read {self.url_of(name)} ({reason}); check address, credentials and network, "
                        "and start again: what was downloaded is kept"
                    ) from error
            time.sleep(min(self.first_wait_s * 2 ** (attempt - 1), _MAX_WAIT_S))


def _is_refusal(error: Exception) -> bool:
    """Whether the server answered that it will not give the file, now or later."""
    return isinstance(error, PermissionError) or getattr(error, "status", 0) in _REFUSALS
