"""Datasets in an object store, served by moto's S3 server in a subprocess."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from muomni.config.run import DataSection
from muomni.data.shards.datasets import open_datasets, open_tokenizer
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from muomni.data.shards.source import Source
from muomni.data.text.tokenizer import Tokenizer
from muomni.errors import DataError

pytest.importorskip("s3fs", reason="needs s3fs (extra s3)")
pytest.importorskip("moto.server", reason="needs moto[server]")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url, server)
        yield url
    finally:
        server.kill()
        server.wait()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and server.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the S3 server did not start (exit code {server.poll()})")


@pytest.fixture
def store(endpoint: str, data_root: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A bucket with the corpora; credentials and endpoint come from the environment."""
    import s3fs

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    files = s3fs.S3FileSystem()
    bucket = f"corpora-{os.getpid()}"
    if not files.exists(bucket):
        files.mkdir(bucket)
        files.put(f"{data_root}/", f"{bucket}/mine", recursive=True)
    return f"s3://{bucket}/mine"


def data_at(url: str, cache: Path) -> DataSection:
    return DataSection(root=url, cache_dir=str(cache))


def test_bucket_reads_like_a_local_folder(store: str, data_root: Path, tmp_path: Path) -> None:
    data = data_at(store, tmp_path)
    found = open_datasets(data, ["text"])
    assert [manifest.location for manifest in found] == [f"{store}/a", f"{store}/b"]
    local = Source([Manifest.load(data_root / name) for name in ("a", "b")], "train")
    remote = Source(found, "train")
    assert remote.fingerprint == local.fingerprint
    assert len(remote) == len(local) == 60
    assert all(remote.read(index) == local.read(index) for index in range(60))
    assert open_tokenizer(data).digest == Tokenizer.load(data_root / "tokenizer.model").digest


def test_error_names_a_missing_object(store: str, tmp_path: Path) -> None:
    import s3fs

    [first, _] = open_datasets(data_at(store, tmp_path), ["text"])
    reader = SplitReader(first, "val")
    shard = first.split("val").shards[0]
    s3fs.S3FileSystem().rm(f"{store}/a/{shard.path}")
    with pytest.raises(DataError, match=rf"{store}/a/{shard.path} is missing"):
        reader.read(0)


def test_missing_bucket_is_rejected(store: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no dataset"):
        open_datasets(data_at("s3://nowhere-at-all/x", tmp_path), ["text"])
