"""A run with persistent non-finite gradients stops on all ranks; names module, samples, and good weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.checkpoint import file_list
from muomni.distributed import collectives
from muomni.distributed.discovery import discover
from muomni.errors import NonFiniteError
from muomni.models.layers.transformer import TransformerBlock
from muomni.training.engine.deepspeed_quirks import local_elements
from muomni.training.session import Request, open_loop, prepare
from muomni.training.stages.thinker import ThinkerTask
from tests.ranks import RankPool
from tests.training.engine.test_expert_parallel import engine, moe_config
from tests.training.runs import thinker_config, train

FIRST_BAD = 4  # the first bad step on the faulty rank; all later ones are bad as well


class _Poison(torch.autograd.Function):
    """The identity with an infinite gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0] * float("inf")


@contextmanager
def _broken_block(phase: str, bad_rank: int, first: int) -> Iterator[list[Any]]:
    """Break the second block of a Thinker from its `first` pass on; yields the batches seen then."""
    rank = torch.distributed.get_rank()
    seen: list[Any] = []
    calls = [0]
    task_forward, block_forward = ThinkerTask.forward, TransformerBlock.forward

    def forward(self: ThinkerTask, batch: Any) -> Any:
        calls[0] += 1
        seen.append({name: tensor.clone() for name, tensor in batch.items()})
        return task_forward(self, batch)

    def broken(self: TransformerBlock, x: torch.Tensor, context: Any, layer: int = 0) -> Any:
        y = block_forward(self, x, context, layer)
        if rank != bad_rank or layer != 1 or calls[0] < first or not self.training:
            return y
        return y * float("nan") if phase == "forward" else _Poison.apply(y)

    ThinkerTask.forward = forward  # type: ignore[method-assign]
    TransformerBlock.forward = broken  # type: ignore[method-assign]
    try:
        yield seen
    finally:
        ThinkerTask.forward = task_forward  # type: ignore[method-assign]
        TransformerBlock.forward = block_forward  # type: ignore[method-assign]


def _stop(config: Any, run: Path, zero: Any, phase: str, bad_rank: int = 1) -> dict[str, Any]:
    """Train until the run stops; returns its message and the batches of this rank."""
    num_passes = config.batch.global_sequences // torch.distributed.get_world_size()
    with _broken_block(phase, bad_rank, (FIRST_BAD - 1) * num_passes + 1) as seen:
        try:
            train(config, run, zero)
        except NonFiniteError as error:
            return {"message": str(error), "code": error.exit_code, "seen": seen}
    raise AssertionError("the run did not stop")


def _weights(config: Any, run: Path, zero: Any) -> dict[str, torch.Tensor]:
    """The weights of the newest checkpoint."""
    loop = open_loop(prepare(Request(config, run, run, engine(zero)), discover()))
    state = loop.engine.full_state("")
    loop.engine.deepspeed.destroy()
    return state


CASES = [
    # precision, ZeRO, where it breaks, bad steps before the stop
    ("fp32", 0, "forward", 3),
    ("fp32", 1, "backward", 3),
    ("bf16", 0, "backward", 3),
    ("bf16", 2, "forward", 3),
    ("fp32", 3, "forward", 3),
    ("fp16", 0, "forward", 1),
    ("fp16", 1, "backward", 1),
    ("fp16", 3, "backward", 1),
]


@pytest.mark.parametrize(("precision", "zero", "phase", "num_bad"), CASES)
def test_non_finite_values_are_reported_and_dumped(
    precision: str,
    zero: int,
    phase: str,
    num_bad: int,
    text_data: Path,
    tmp_path: Path,
    two_ranks: RankPool,
) -> None:
    changes = {
        "precision": precision,
        "fp16": {"initial_scale_power": 0},
        "training": {"max_steps": 12, "log_every": 100},
    }
    config = thinker_config(text_data, changes)  # two micro-batches per rank
    results = two_ranks.run(_stop, config=config, run=tmp_path, zero=engine(zero), phase=phase)
    step = FIRST_BAD + num_bad - 1
    for result in results:
        assert result["code"] == 6
        assert result["message"] == results[0]["message"]
    message = results[0]["message"]
    assert f"in step {step} thinker.stack.blocks.1" in message
    assert f"first non-finite {'output' if phase == 'forward' else 'gradient'}" in message
    assert "(rank 1, micro-batch 0 with samples " in message

    folder = tmp_path / "thinker" / "nonfinite"
    assert sorted(path.name for path in folder.iterdir()) == [
        f"step_{step}_rank1.json", f"step_{step}_rank1.pt",
    ]  # fmt: skip
    text = (folder / f"step_{step}_rank1.json").read_text()
    report = json.loads(text, parse_constant=pytest.fail)  # NaN is not JSON
    first = report["findings"][0]
    assert (first["micro_batch"], first["phase"]) == (0, phase)
    assert any(name.startswith("thinker.stack.blocks.0.") for name in first["parameters"])
    assert len(report["findings"]) == 2
    assert (first["losses"]["loss"] == "nan") == (phase == "forward")

    # The file holds the batches of that step, although the run continued.
    dump = torch.load(folder / f"step_{step}_rank1.pt", weights_only=True)
    seen = results[1]["seen"][2 * (step - 1) : 2 * step]
    for kept, batch in zip(dump["micro_batches"], seen, strict=True):
        assert kept["batch"].keys() == batch.keys()
        for name, tensor in kept["batch"].items():
            assert torch.equal(tensor, batch[name].to(tensor.dtype)), name
        assert kept["samples"][0]["key"] is not None
        assert Path(kept["samples"][0]["shard"]).is_file()
    assert dump["micro_batches"][0]["samples"][0]["key"] in message

    # The checkpoint is complete and has the weights of the last good step.
    newest = file_list.newest_complete(tmp_path / "thinker" / "checkpoints")
    assert newest is not None and str(newest) in message
    assert newest.name == f"step_{step + 1:08d}"
    short = thinker_config(text_data, {**changes, "training": {"max_steps": FIRST_BAD - 1}})
    if precision == "fp32":
        expected = two_ranks.run(_cut_short, config=short, run=tmp_path / "short", zero=zero)[0]
        kept = two_ranks.run(_weights, config=config, run=tmp_path, zero=zero)[0]
        for name, tensor in kept.items():
            assert torch.isfinite(tensor).all()
            torch.testing.assert_close(tensor, expected[name], atol=0, rtol=0, msg=name)


def _cut_short(config: Any, run: Path, zero: int) -> dict[str, torch.Tensor]:
    """Weights after the steps of `config`, with the learning rates of a run of 12 steps."""
    longer = config.model_copy(
        update={"training": config.training.model_copy(update={"max_steps": 12})}
    )
    loop = open_loop(prepare(Request(longer, run, run, engine(zero)), discover()))
    for _ in range(config.training.max_steps):
        loop.train_step()
    state = loop.engine.full_state("")
    loop.engine.deepspeed.destroy()
    return state


def test_diagnosis_reruns_experts_of_all_ranks_together(
    text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = moe_config(text_data, {"training": {"log_every": 100}})
    for zero, phase in ((0, "forward"), (3, "backward")):
        run = tmp_path / str(zero)
        results = two_ranks.run(_stop, config=config, run=run, zero=engine(zero, 2), phase=phase)
        # Rank 0 finds it as well, in the gradients of its experts, which process tokens of rank 1.
        assert "in step 6 thinker.stack.blocks.1" in results[0]["message"]
        assert "(rank 1, micro-batch 0 with" in results[0]["message"]
        assert (run / "thinker" / "nonfinite" / "step_6_rank1.pt").is_file()


def test_a_persistent_non_finite_logged_loss_is_diagnosed(
    text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    # It logs each step, before the third bad step is known.
    config = thinker_config(text_data, {"training": {"save_every": 1, "keep_last": 1}})
    results = two_ranks.run(_stop, config=config, run=tmp_path, zero=engine(1), phase="forward")
    assert results[0]["message"].startswith("the loss of 3 logged steps up to step 6 is non-finite")
    assert "in step 5 thinker.stack.blocks.1" in results[0]["message"]
    # Repeated restarts do not prune good checkpoints.
    names = [path.name for path in (tmp_path / "thinker" / "checkpoints").glob("step_*")]
    assert sorted(names) == ["step_00000005", "step_00000006"]


def _stop_by_sum(config: Any, run: Path) -> str:
    """Stop a run whose gradients are finite but whose norm is infinite."""
    utils: Any = torch.nn.utils
    original = utils.get_total_norm
    utils.get_total_norm = lambda *args, **kwargs: original(*args, **kwargs) + float("inf")
    try:
        return _stop(config, run, engine(0), "forward", bad_rank=9)["message"]
    finally:
        utils.get_total_norm = original


def test_if_nothing_is_found_all_ranks_dump_their_batches(
    text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    config = thinker_config(text_data, {"training": {"log_every": 100}})
    message = two_ranks.run(_stop_by_sum, config=config, run=tmp_path)[0]
    assert "all outputs and gradients of step 3 are finite on every rank" in message
    folder = tmp_path / "thinker" / "nonfinite"
    assert len(list(folder.glob("step_3_rank*.pt"))) == 2


def _stop_with_non_finite_weights(config: Any, run: Path) -> str:
    """Stop a run in which a weight becomes NaN on all ranks in the fifth step."""
    original, calls = ThinkerTask.forward, [0]

    def forward(self: ThinkerTask, batch: Any) -> Any:
        calls[0] += 1
        if calls[0] == 2 * 4 + 1:
            next(self.parameters()).data.view(-1)[0] = float("nan")
        return original(self, batch)

    ThinkerTask.forward = forward  # type: ignore[method-assign]
    try:
        train(config, run, engine(0))
    except NonFiniteError as error:
        return str(error)
    finally:
        ThinkerTask.forward = original  # type: ignore[method-assign]
    raise AssertionError("the run did not stop")


@pytest.mark.parametrize(
    ("save_every", "last"),
    [
        (4, "step_00000004"),
        (2, "step_00000004"),  # the save after the sixth step comes before gradients stop the run
        (5, None),
    ],
)
def test_non_finite_weights_are_not_saved(
    save_every: int, last: str | None, text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    changes = {"max_steps": 12, "log_every": 100, "save_every": save_every}
    config = thinker_config(text_data, {"training": changes})
    messages = two_ranks.run(_stop_with_non_finite_weights, config=config, run=tmp_path)
    assert messages[0] == messages[1]
    checkpoints = tmp_path / "thinker" / "checkpoints"
    newest = (
        f"the last checkpoint is {checkpoints / last}" if last else "there is no checkpoint yet"
    )
    assert "thinker.embed_tokens.weight is non-finite" in messages[0]
    assert f"the weights are not saved, and {newest}" in messages[0]
    assert "samples" not in messages[0]
    assert max((path.name for path in checkpoints.glob("step_*")), default=None) == last


def _first_non_finite(config: Any, run: Path, zero: int, name: str) -> list[str | None]:
    """Findings before and after one element of a weight becomes infinite on the last rank only."""
    loop = open_loop(prepare(Request(config, run, run, engine(zero)), discover()))
    weight: Any = dict(loop.engine.task.named_parameters())[name]
    found = [loop.engine.first_non_finite_weight()]
    if collectives.rank() == collectives.world_size() - 1:
        getattr(weight, "ds_tensor", weight).data.view(-1)[-1] = float("inf")
    found.append(loop.engine.first_non_finite_weight())
    loop.engine.deepspeed.destroy()
    return found


@pytest.mark.parametrize("zero", [0, 2, 3])
def test_a_non_finite_weight_on_one_rank_is_found_by_all(
    zero: int, text_data: Path, tmp_path: Path, two_ranks: RankPool
) -> None:
    name = "thinker.stack.blocks.1.mlp.down_proj.weight"
    config = thinker_config(text_data)
    found = two_ranks.run(_first_non_finite, config=config, run=tmp_path, zero=zero, name=name)
    assert found == [[None, name]] * 2


def test_padding_of_a_shard_is_ignored() -> None:
    """Three elements on two ranks: the last shard has room for two."""
    for rank, num_own in ((0, 2), (1, 1), (2, 0)):
        part = torch.tensor([1.0, 1.0])
        part[num_own:] = float("nan")
        weight: Any = torch.nn.Parameter(torch.empty(0))
        weight.ds_tensor, weight.ds_numel, weight.ds_zero_partition_rank = part, 3, rank
        assert local_elements(weight).tolist() == [1.0] * num_own


@contextmanager
def _infinite_at(calls_at: set[int]) -> Iterator[None]:
    original, calls = ThinkerTask.forward, [0]

    def forward(self: ThinkerTask, batch: Any) -> Any:
        output = original(self, batch)
        calls[0] += 1
        if calls[0] in calls_at:
            output.losses["loss"] = output.losses["loss"] * float("inf")
        return output

    ThinkerTask.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        ThinkerTask.forward = original  # type: ignore[method-assign]


def _steps_around(config: Any, run: Path) -> list[dict[str, torch.Tensor]]:
    """The number of skipped steps, and the weights after the second, a bad third, and the fourth step."""
    loop = open_loop(prepare(Request(config, run, run, engine(0)), discover()))
    states = []
    with _infinite_at({9}):  # the first micro-batch of the third step
        for _ in range(4):
            loop.train_step()
            states.append(loop.engine.full_state(""))
    states[0] = {"skipped": torch.tensor(loop.engine.count_skipped())}
    loop.engine.deepspeed.destroy()
    return states


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_plain_fp32_skips_a_bad_step_and_continues(
    optimizer: str, text_data: Path, tmp_path: Path, one_rank: RankPool
) -> None:
    config = thinker_config(text_data, {"optim": {"name": optimizer}})
    skipped, before, after, later = one_rank.run(_steps_around, config=config, run=tmp_path)[0]
    assert skipped["skipped"] == 1
    torch.testing.assert_close(after, before, atol=0, rtol=0)
    assert all(torch.isfinite(tensor).all() for tensor in later.values())
    assert any(not torch.equal(tensor, after[name]) for name, tensor in later.items())
