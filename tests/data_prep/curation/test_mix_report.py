"""`data_prep mix` prints what training would draw."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.cli.main import main
from muomni.config.run import DataSection, MixSection
from muomni.data.sampling.lengths import Lengths
from muomni.data.sampling.mix import MixSegment, configured_quotas, open_order
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.source import Source
from tests.corpora import write_text_dataset


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_text_dataset(root / "books", num_train=40)
    write_text_dataset(root / "web", num_train=200)
    return root


def report(root: Path, capsys: pytest.CaptureFixture[str], *more: str) -> list[dict[str, float]]:
    main(["mix", "--data", str(root), "--json", *more])
    return json.loads(capsys.readouterr().out)


def test_report_matches_training(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = ("--steps", "60", "--samples-per-step", "10")
    books, web = report(root, capsys, "--weights", "books=1", "web=2", *steps)
    source = Source([Manifest.load(root / name) for name in ("books", "web")], "train")
    lengths = Lengths(len(source), np.ones_like, "one")
    mix = MixSection(weights={"books": 1, "web": 2})
    segment = MixSegment(0, 0, configured_quotas(source, lengths, mix))
    ids, epochs = open_order(source, DataSection(), 0, 64, [segment]).samples(0, 600)
    assert books["num_draws"] == (ids < 40).sum() == 200 and books["epochs"] == 5.0
    assert web["num_draws"] == (ids >= 40).sum() == 400 and web["epochs"] == 2.0
    assert set(epochs[ids < 40].tolist()) == set(range(5))
    columns = source.columns["num_chars"]
    assert books["num_chars"] == round(200 * columns[:40].mean())


def test_default_shares_are_proportional_to_size(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    books, web = report(root, capsys, "--task", "text")
    assert (books["num_draws"], web["num_draws"]) == (40, 200)
    main(["mix", "--data", str(root), "--alpha", "0"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["corpus", "samples", "share"]
    assert [line.split()[0] for line in lines[1:]] == ["books", "web"]
    assert [line.split()[4] for line in lines[1:]] == ["3.00", "0.60"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--weights", "bokks=1", "web=1"], "did you mean 'books'?"),
        (["--weights", "books:1"], "takes NAME=WEIGHT, got 'books:1'"),
        (["--weights", "books=1", "web=1", "--alpha", "1"], "exactly one of"),
        (["--steps", "5"], "--steps and --samples-per-step must be used together"),
        (["--unit", "words"], "unit"),
    ],
)
def test_invalid_mix_is_one_line(
    more: list[str], message: str, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["mix", "--data", str(root), *more])
    assert stop.value.code == 2
    error = capsys.readouterr().err.strip()
    assert message in error and "\n" not in error
