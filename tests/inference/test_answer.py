"""Questions with media become prompts; answers follow the media; bad input is named."""

from pathlib import Path

import pytest
import torch

from muomni.errors import ConfigError, DataError
from muomni.inference.answer import answer, answer_together, encode_question, read_question
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


def test_answers_follow_the_image_and_end(assistant: Assistant, files: dict[str, Path]) -> None:
    for name in COLORS:
        made = answer(assistant, read_question("the door", images=[files[name]]))
        assert made.text == name and made.stopped
        assert made.hidden.shape == (1, len(made.ids), 32)


def test_several_media_and_a_system_turn_are_read(
    assistant: Assistant, files: dict[str, Path]
) -> None:
    question = read_question(
        "the door", images=[files["red"], files["blue"]], audios=[files["low"]], system="be kind"
    )
    assert [turn.role for turn in question.turns] == ["system", "user"]
    kinds = [part.kind for part in question.turns[1].parts]
    assert kinds == ["image", "image", "audio", "text"]
    assert len(answer(assistant, question, max_new_tokens=3).ids) <= 3


def test_placeholders_of_a_text_take_the_files_in_turn(files: dict[str, Path]) -> None:
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


def test_files_and_placeholders_that_do_not_fit_are_refused(files: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=r"--text does not fit the files: <audio> has no file"):
        read_question("Repeat: <audio>", images=[files["red"]])
    with pytest.raises(
        ConfigError, match=r"fewer <image> than there are files: .*blue.png is left"
    ):
        read_question("What is <image>?", images=[files["red"], files["blue"]])


def test_questions_are_answered_together_as_alone(
    assistant: Assistant, files: dict[str, Path]
) -> None:
    """Padding, other rows' media and other rows' limits change no answer."""
    questions = [
        (read_question("the door", images=[files["red"]]), 9),
        (read_question("again and again the door", audios=[files["low"]]), 3),
        (read_question("one " * 30), 20),
        (read_question("the door", images=[files["blue"], files["red"]], audios=[files["low"]]), 1),
    ]
    prompts = [encode_question(assistant, question, limit) for question, limit in questions]
    together = answer_together(assistant, prompts)
    assert len({made.stopped for made in together}) == 2  # some are cut, some end by themselves
    for made, (question, limit) in zip(together, questions, strict=True):
        alone = answer(assistant, question, max_new_tokens=limit)
        assert (made.ids, made.text, made.stopped) == (alone.ids, alone.text, alone.stopped)
        torch.testing.assert_close(made.hidden, alone.hidden, atol=1e-4, rtol=1e-4)


def test_an_answer_that_repeats_itself_is_cut_behind_the_first_time(
    assistant: Assistant, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two answers in a batch one loops through three tokens; the other goes on to its end."""
    model, characters = assistant.model, torch.tensor([40, 41, 42])
    number = iter(range(100))

    def logits(state: torch.Tensor) -> torch.Tensor:
        step = next(number)
        chosen = torch.tensor([characters[step % 3].item(), 50 + step])
        return torch.nn.functional.one_hot(chosen, model.config.thinker.vocab_size).float()[:, None]

    monkeypatch.setattr(model.thinker, "logits", logits)
    prompts = [encode_question(assistant, read_question("the door"), limit) for limit in (20, 20)]
    loop, other = answer_together(assistant, prompts)
    assert loop.ids == characters.tolist() and not loop.stopped and loop.hidden.shape[1] == 3
    assert other.ids == list(range(50, 70))
    number = iter(range(100))
    whole, _ = answer_together(assistant, prompts, cut_loops=False)
    assert len(whole.ids) == 20
    number = iter(range(100))
    least, _ = answer_together(assistant, prompts, min_new_tokens=14)
    assert len(least.ids) == 14 and not least.stopped


def test_draws_depend_on_the_seed_alone(assistant: Assistant, files: dict[str, Path]) -> None:
    question = read_question("again", audios=[files["low"]])

    def draw(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        made = answer(assistant, question, max_new_tokens=12, temperature=2.0, generator=generator)
        return made.ids

    assert draw(1) == draw(1)
    assert any(draw(1) != draw(seed) for seed in (2, 3, 4))


def test_nothing_to_ask_is_refused() -> None:
    for text in (None, "  "):
        with pytest.raises(ConfigError, match="nothing to answer"):
            read_question(text)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, assistant: Assistant) -> None:
    with pytest.raises(DataError, match=r"cannot read image .*none.png"):
        read_question("a", images=[tmp_path / "none.png"])
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"a.txt is no audio file"):
        read_question("a", audios=[tmp_path / "a.txt"])
    (tmp_path / "broken.png").write_bytes(b"PNG")
    with pytest.raises(DataError, match=r"broken.png: broken image"):
        answer(assistant, read_question("a", images=[tmp_path / "broken.png"]))


def test_too_long_a_question_is_refused(assistant: Assistant, files: dict[str, Path]) -> None:
    question = read_question("the door " * 200)
    with pytest.raises(DataError, match=r"takes \d+ positions.* the model's 256"):
        answer(assistant, question)
