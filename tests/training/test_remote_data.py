"""Training from a URL gives the losses of training from a folder."""

from pathlib import Path

import pytest

from tests.io.http_folder import serve
from tests.ranks import RankPool
from tests.training.runs import thinker_config, train


@pytest.mark.parametrize("num_workers", [0, 1])
def test_losses_do_not_depend_on_the_location_of_the_data(
    num_workers: int, text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    changes = {"data": {"num_workers": num_workers}, "training": {"max_steps": 4}}
    local = thinker_config(text_data, changes)
    expected = two_ranks.run(train, config=local, run=tmp_path / "local")[0]
    (text_data / "datasets.json").write_text('["text"]')
    with serve(text_data) as server:
        data = {
            "root": server.url,
            "cache_dir": str(tmp_path / "cache"),
            "num_workers": num_workers,
        }
        remote = thinker_config(text_data, {**changes, "data": data})
        found = two_ranks.run(train, config=remote, run=tmp_path / "remote")[0]
    assert found["losses"] == expected["losses"]
    assert found["val/loss"] == expected["val/loss"]
    tars = {name: count for name, count in server.requests.items() if name.endswith(".tar")}
    assert sorted(tars.values()) == [1, 1]  # train and val, once for both ranks
