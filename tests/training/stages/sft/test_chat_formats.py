"""Stage sft trains on conversations of the formats of other tools, as `data_prep` shards them."""

from pathlib import Path

import numpy as np

from data_prep.cli.main import main
from muomni.data.shards.manifest import Manifest
from muomni.data.text.tokenizer import Tokenizer
from tests.conversations import write_upstream
from tests.corpora import write_tokenizer
from tests.data_prep.public_layouts import LAYOUTS
from tests.ranks import RankPool
from tests.training.runs import train
from tests.training.stages.sft.omni_runs import omni_run

FORMATS = ("alpaca", "jsonl", "openai", "parquet", "sharegpt", "swift")


def test_sft_trains_on_shards_of_all_chat_formats(tmp_path: Path, one_rank: RankPool) -> None:
    root = tmp_path / "data"
    for name in FORMATS:
        (tmp_path / name).mkdir()
        src = LAYOUTS["sft"][name](tmp_path / name)
        arguments = ("--src", str(src), "--out", str(root / name), "--val-fraction", "0.3")
        main(["sft", "--format", name, *arguments, "--test-fraction", "0", "--workers", "1"])
    manifests = [Manifest.load(root / name) for name in FORMATS]
    assert sum(manifest.split("train").num_samples for manifest in manifests) > 20
    write_tokenizer(root / "tokenizer.model")
    write_upstream(root / "run", Tokenizer.load(root / "tokenizer.model"))
    changes = {
        "batch": {"seq_len": 160, "global_tokens": 640},
        "training": {"max_steps": 3, "validate_every": 3},
    }
    config = omni_run("sft", root, changes)
    (result,) = one_rank.run(train, config=config, run=tmp_path / "run", upstream=root / "run")
    assert len(result["losses"]) == 3 and np.isfinite(result["losses"]).all()
    assert {"val/image_answer_loss", "val/answer_loss"} <= result.keys()
