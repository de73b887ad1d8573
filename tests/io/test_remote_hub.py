"""Datasets on the Hugging Face Hub: the real client with a local server that implements its API."""

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from muomni.config.run import DataSection
from muomni.data.shards.datasets import open_datasets, open_tokenizer
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.source import Source
from muomni.data.text.tokenizer import Tokenizer
from muomni.errors import DataError
from tests.io.http_folder import HttpFolder, send_file, serve

pytest.importorskip("huggingface_hub", reason="needs huggingface_hub (extra hf)")

REPOSITORY = "team/corpora"


def answer_as_hub(request: BaseHTTPRequestHandler, state: HttpFolder) -> None:
    """Serve the folder as revision `main` of the dataset repository `REPOSITORY`."""
    path = urlsplit(request.path).path
    api, files = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/main/"
    if path in (api, f"{api}/revision/main"):
        _send_json(request, {"id": REPOSITORY, "sha": "0" * 40, "siblings": []})
    elif path.startswith(f"{api}/tree/main"):
        folder = state.folder / path.removeprefix(f"{api}/tree/main").strip("/")
        if folder.is_dir():
            _send_json(request, [_entry(entry, state.folder) for entry in sorted(folder.iterdir())])
        else:
            _refuse(request, "EntryNotFound")
    elif path == f"{api}/paths-info/main":
        body = request.rfile.read(int(request.headers["Content-Length"])).decode()
        wanted = [state.folder / name for name in parse_qs(body)["paths"]]
        _send_json(request, [_entry(path, state.folder) for path in wanted if path.exists()])
    elif path.startswith(files):
        send_file(request, state, path.removeprefix(files))
    else:
        _refuse(request, "RepoNotFound")


def _entry(path: Path, root: Path) -> dict[str, object]:
    name = str(path.relative_to(root))
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    return {"type": "file", "path": name, "oid": "0" * 40, "size": path.stat().st_size}


def _send_json(request: BaseHTTPRequestHandler, content: object) -> None:
    body = json.dumps(content).encode()
    request.send_response(200)
    request.send_header("Content-Type", "application/json")
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def _refuse(request: BaseHTTPRequestHandler, code: str) -> None:
    request.send_response(404)
    request.send_header("X-Error-Code", code)
    request.send_header("Content-Length", "0")
    request.end_headers()


@pytest.fixture
def hub(data_root: Path) -> Iterator[HttpFolder]:
    with serve(data_root, answer_as_hub) as state:
        yield state


def data_at(hub: HttpFolder, repository: str, cache: Path) -> DataSection:
    return DataSection(
        root=f"hf://datasets/{repository}",
        cache_dir=str(cache),
        storage_options={"endpoint": hub.url},
    )


def test_repository_reads_like_a_local_folder(
    hub: HttpFolder, data_root: Path, tmp_path: Path
) -> None:
    data = data_at(hub, REPOSITORY, tmp_path)
    found = open_datasets(data, ["text"])
    assert [manifest.name for manifest in found] == ["a", "b"]
    local = Source([Manifest.load(data_root / name) for name in ("a", "b")], "train")
    remote = Source(found, "train")
    assert remote.fingerprint == local.fingerprint
    assert all(remote.read(index) == local.read(index) for index in range(60))
    assert open_tokenizer(data).digest == Tokenizer.load(data_root / "tokenizer.model").digest


def test_temporary_server_failure_is_retried(
    hub: HttpFolder, data_root: Path, tmp_path: Path
) -> None:
    hub.fail_first(2, "cut")
    [first, _] = open_datasets(data_at(hub, REPOSITORY, tmp_path), ["text"])
    local = Source([Manifest.load(data_root / "a")], "train")
    remote = Source([first], "train")
    assert all(remote.read(index) == local.read(index) for index in range(30))


def test_missing_repository_is_rejected(hub: HttpFolder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no dataset"):
        open_datasets(data_at(hub, "team/nowhere", tmp_path), ["text"])
