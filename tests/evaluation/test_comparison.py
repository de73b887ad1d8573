"""`muomni compare` shows the metrics of runs in one table, and what differs in their configs."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from muomni.cli.main import main
from muomni.evaluation.comparison import compare
from muomni.evaluation.comparison_page import page


def _run(folder: Path, lr: float, losses: list[float], stage: str = "thinker") -> Path:
    """A run folder with a loss every 10 steps, the best validation before the last one."""
    root = folder / stage
    root.mkdir(parents=True)
    lines = [{"step": 10 * n, "kind": "train", "loss": v} for n, v in enumerate(losses, start=1)]
    lines += [{"step": n, "kind": "val", "val/loss": lr + n} for n in (10, 20)]
    lines.append({"step": 30, "kind": "train", "loss": None})
    (root / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"optim": {"lr": lr, "beta": 0.9}, "resolved": {"deepspeed": {"lr": lr}}}
    (root / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def test_metrics_and_differing_settings_are_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = _run(tmp_path / "a", 0.1, [3.0, 2.5])
    second = _run(tmp_path / "b", 0.2, [3.0, 2.0])
    (second / "thinker" / "evaluation.json").write_text('{"metrics": {"perplexity": 7.5}}')
    target = tmp_path / "page.html"
    main(["compare", str(first), str(second), "--html", str(target)])
    printed = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    for row in (
        ["thinker", str(first), str(second)],
        ["steps", "30", "30"],
        ["loss, last", "2.5", "2"],
        ["val/loss, best", "10.1", "10.2"],
        ["val/loss, last", "20.1", "20.2"],
        ["test/perplexity", "-", "7.5"],
        ["optim.lr", "0.1", "0.2"],
    ):
        assert row in printed
    assert not any(row[0] in ("optim.beta", "resolved.deepspeed.lr") for row in printed)
    assert "<polyline" in target.read_text()


class _Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_the_page_overlays_curves_and_loads_nothing(tmp_path: Path) -> None:
    runs = [_run(tmp_path / name, 0.1, [3.0, 2.5, 2.0]) for name in ("a", "<b>&")]
    text = page(compare(runs))
    tags = _Tags(text).found
    assert not {"script", "link", "img", "iframe", "b"} & {tag for tag, _ in tags}
    lines = [dict(attributes) for tag, attributes in tags if tag == "polyline"]
    assert len(lines) == 2 and len({line["stroke"] for line in lines}) == 2
    for line in lines:
        points = [tuple(map(float, p.split(","))) for p in (line["points"] or "").split()]
        heights = [y for _, y in points]
        assert len(points) == 3 and heights == sorted(heights)  # a falling loss goes down
    assert sum(tag == "circle" for tag, _ in tags) == 4
    assert "None." in text  # the configs are equal


def test_long_curves_are_thinned(tmp_path: Path) -> None:
    runs = [_run(tmp_path / name, 0.1, [1.0 + 1 / n for n in range(1, 5001)]) for name in "ab"]
    (line, _) = [a for tag, a in _Tags(page(compare(runs))).found if tag == "polyline"]
    assert 900 <= len((line["points"] or "").split()) <= 1001


def test_only_stages_of_two_runs_are_compared(tmp_path: Path) -> None:
    runs = [_run(tmp_path / name, 0.1, [1.0]) for name in "abc"]
    _run(runs[0], 0.1, [1.0], "codec")
    assert [each.stage for each in compare(runs)] == ["thinker"]


@pytest.mark.parametrize(
    ("names", "options", "message"),
    [
        (["a"], [], "at least two runs"),
        (["a", "missing"], [], "missing does not exist"),
        (["a", "b"], ["--stage", "codec"], "metrics of stage codec"),
        (["a", "b"], ["--stage", "codek"], "did you mean"),
        (["a", "broken"], [], "cannot be read"),
        (["a", "b"], ["--html", "a/thinker"], "choose another --html"),
    ],
)
def test_bad_input_is_one_sentence(
    names: list[str], options: list[str], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b", "broken"):
        _run(Path(name), 0.1, [1.0])
    Path("broken/thinker/metrics.jsonl").write_text("no json\n")
    with pytest.raises(SystemExit) as stopped:
        main(["compare", *names, *options])
    error = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and message in error and "\n" not in error
    assert not Path("compare.html").exists()
