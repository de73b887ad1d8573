"""Questions with media are encoded and answered; invalid input is named."""

from pathlib import Path

import pytest
import torch

from muomni.errors import ConfigError, DataError
from muomni.inference.answer import answer, answer_batch, encode_question, read_question
from muomni.inference.load import Assistant, load_assistant
from tests.conversations import COLORS, png, tone
from tests.inference.exports import write_sft_export


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Assistant:
    run = tmp_path_factory.mktemp("run")
    write_sft_export(run, num_steps=85)
    return load_assistant(run, torch.device("cpu"))


@pytest.fixture()
def files(tmp_path: Path) -> dict[str, Path]:
    for name, color in COLORS.items():
        (tmp_path / f"{name}.png").write_bytes(png(color))
    (tmp_path / "low.wav").write_bytes(tone(200))
    return {path.stem: path for path in tmp_path.iterdir()}


def test_answers_depend_on_image_and_stop(assistant: Assistant, files: dict[str, Path]) -> None:
    for name in COLORS:
        generated = answer(assistant, read_question("the door", images=[files[name]]))
        assert generated.text == name and generated.stopped
        assert generated.hidden.shape == (1, len(generated.ids), 32)


def test_several_media_and_system_turn(assistant: Assistant, files: dict[str, Path]) -> None:
    question = read_question(
        "the door", images=[files["red"], files["blue"]], audios=[files["low"]], system="be kind"
    )
    assert [turn.role for turn in question.turns] == ["system", "user"]
    kinds = [part.kind for part in question.turns[1].parts]
    assert kinds == ["image", "image", "audio", "text"]
    assert len(answer(assistant, question, max_new_tokens=3).ids) <= 3


def test_placeholders_are_replaced_by_files_in_order(files: dict[str, Path]) -> None:
    images, audios = [files["red"], files["blue"]], [files["low"]]
    question = read_question("Is <image> like <image>?", images=images, audios=audios)
    (turn,) = question.turns
    assert [(part.kind, part.value) for part in turn.parts] == [
        ("audio", str(files["low"])),
        ("text", "Is"),
        ("image", str(files["red"])),
        ("text", "like"),
        ("image", str(files["blue"])),
        ("text", "?"),
    ]


def test_mismatched_placeholders_are_rejected(files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"--text does not match the files: <audio> has no file"):
        read_question("Repeat: <audio>", images=[files["red"]])
    with pytest.raises(
        ConfigError, match=r"fewer <image> placeholders than files: .*blue.png has none"
    ):
        read_question("What is <image>?", images=[files["red"], files["blue"]])


def test_batched_answers_equal_single_answers(assistant: Assistant, files: dict[str, Path]) -> None:
    """Answers do not depend on padding or on media and limits of other rows."""
    questions = [
        (read_question("the door", images=[files["red"]]), 9),
        (read_question("again and again the door", audios=[files["low"]]), 3),
        (read_question("one " * 30), 20),
        (read_question("the door", images=[files["blue"], files["red"]], audios=[files["low"]]), 1),
    ]
    prompts = [encode_question(assistant, question, limit) for question, limit in questions]
    batched = answer_batch(assistant, prompts)
    assert len({generated.stopped for generated in batched}) == 2  # some are truncated, some stop
    for generated, (question, limit) in zip(batched, questions, strict=True):
        single = answer(assistant, question, max_new_tokens=limit)
        assert (generated.ids, generated.text) == (single.ids, single.text)
        assert generated.stopped == single.stopped
        torch.testing.assert_close(generated.hidden, single.hidden, atol=1e-4, rtol=1e-4)


def test_repetitive_answer_is_truncated_after_first_occurrence(
    assistant: Assistant, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a batch of two, one answer repeats three tokens; the other is complete."""
    model, characters = assistant.model, torch.tensor([40, 41, 42])
    number = iter(range(100))

    def logits(state: torch.Tensor) -> torch.Tensor:
        step = next(number)
        chosen = torch.tensor([characters[step % 3].item(), 50 + step])
        return torch.nn.functional.one_hot(chosen, model.config.thinker.vocab_size).float()[:, None]

    monkeypatch.setattr(model.thinker, "logits", logits)
    prompts = [encode_question(assistant, read_question("the door"), limit) for limit in (20, 20)]
    loop, other = answer_batch(assistant, prompts)
    assert loop.ids == characters.tolist() and not loop.stopped and loop.hidden.shape[1] == 3
    assert other.ids == list(range(50, 70))
    number = iter(range(100))
    full, _ = answer_batch(assistant, prompts, cut_loops=False)
    assert len(full.ids) == 20
    number = iter(range(100))
    shortest, _ = answer_batch(assistant, prompts, min_new_tokens=14)
    assert len(shortest.ids) == 14 and not shortest.stopped


def test_text_is_streamed_without_broken_characters(
    assistant: Assistant, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Characters outside of the vocabulary are several tokens, one per byte."""
    text = "the \u2603 caf\u00e9"
    ids = [*assistant.tokenizer.encode(text), assistant.tokenizer.eos_id]
    assert len(ids) > len(text)
    number = iter(range(100))

    def logits(state: torch.Tensor) -> torch.Tensor:
        chosen = torch.tensor([ids[next(number)]])
        size = assistant.model.config.thinker.vocab_size
        return torch.nn.functional.one_hot(chosen, size).float()[:, None]

    monkeypatch.setattr(assistant.model.thinker, "logits", logits)
    pieces: list[str] = []
    answer(assistant, read_question("the door"), on_text=pieces.append)
    assert "".join(pieces) == text and len(pieces) > 3
    assert not any("\ufffd" in piece for piece in pieces)


def test_sampling_is_determined_by_seed(assistant: Assistant, files: dict[str, Path]) -> None:
    question = read_question("again", audios=[files["low"]])

    def sample(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return answer(
            assistant, question, max_new_tokens=12, temperature=2.0, generator=generator
        ).ids

    assert sample(1) == sample(1)
    assert any(sample(1) != sample(seed) for seed in (2, 3, 4))


def test_empty_question_is_rejected() -> None:
    for text in (None, "  "):
        with pytest.raises(ConfigError, match="question is empty"):
            read_question(text)


def test_unreadable_files_are_reported(tmp_path: Path, assistant: Assistant) -> None:
    with pytest.raises(DataError, match=r"cannot read image .*none.png"):
        read_question("a", images=[tmp_path / "none.png"])
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"a.txt is not a supported audio file"):
        read_question("a", audios=[tmp_path / "a.txt"])
    (tmp_path / "broken.png").write_bytes(b"PNG")
    with pytest.raises(DataError, match=r"broken.png: broken image"):
        answer(assistant, read_question("a", images=[tmp_path / "broken.png"]))


def test_too_long_question_is_rejected(assistant: Assistant, files: dict[str, Path]) -> None:
    question = read_question("the door " * 200)
    with pytest.raises(DataError, match=r"question of \d+ tokens.* model's 256"):
        answer(assistant, question)
