"""The tokenizer: round trip, special tokens, training, and wrong files."""

import pickle
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.train_tokenizer import train_tokenizer
from muomni.data.text.tokenizer import MARKERS, Tokenizer
from muomni.errors import ConfigError, DataError
from tests.corpora import write_dataset, write_text_dataset


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_dataset(tmp_path_factory.mktemp("corpus") / "text").root


@pytest.fixture(scope="module")
def tokenizer(corpus: Path) -> Tokenizer:
    return train_tokenizer([corpus], 400, corpus / "tokenizer.model")


def test_special_ids_are_distinct(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.pad_id, tokenizer.unk_id, tokenizer.bos_id, tokenizer.eos_id]
    assert ids == [0, 1, 2, 3]
    ids += [tokenizer.system_id, tokenizer.user_id, tokenizer.assistant_id]
    ids += [tokenizer.image_id, tokenizer.image_start_id, tokenizer.image_end_id]
    ids += [tokenizer.audio_id, tokenizer.audio_start_id, tokenizer.audio_end_id]
    assert len(set(ids)) == len(ids) == 4 + len(MARKERS)
    assert tokenizer.vocab_size == 400
    assert tokenizer.decode(ids[2:]) == ""


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_decode_inverts_encode(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id, tokenizer.pad_id]) == text
    assert tokenizer.unk_id not in ids


@pytest.mark.parametrize("text", [*MARKERS, "<|pad|>", "<|eos|>", "</s>", "<s>", "<pad>", "<unk>"])
def test_special_tokens_typed_by_a_user_are_plain_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(f"before {text} after")
    assert min(ids) > 3 + len(MARKERS)
    assert tokenizer.decode(ids) == f"before {text} after"


def test_frequent_words_are_joined(tokenizer: Tokenizer) -> None:
    text = "the cat watches the green door"
    assert len(tokenizer.encode(text)) < len(text) / 2


def test_training_is_deterministic(corpus: Path, tokenizer: Tokenizer) -> None:
    again = train_tokenizer([corpus], 400, corpus / "again.model")
    assert again.digest == tokenizer.digest
    assert Tokenizer.load(corpus / "again.model").digest == tokenizer.digest


def test_tokenizer_is_picklable(tokenizer: Tokenizer) -> None:
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("the cat") == tokenizer.encode("the cat")
    assert copy.digest == tokenizer.digest


def test_tokenizer_training_ignores_held_out_text(tmp_path: Path, corpus: Path) -> None:
    train = [(f"a{n}", [("txt", b"plain words only")], _cost()) for n in range(50)]
    val = [(f"b{n}", [("txt", "ŽŽŽŽŽ".encode())], _cost()) for n in range(50)]
    write_dataset(tmp_path / "d", "text", {"train": train, "val": val})
    trained = train_tokenizer([tmp_path], 290, tmp_path / "t.model")
    assert len(trained.encode("Ž")) >= 2


def _cost():
    from muomni.data.shards.writer import SampleCost

    return SampleCost(num_chars=1)


def test_error_of_an_impossible_vocab_size_names_the_limit(corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.model"
    with pytest.raises(ConfigError, match=r"90000 is too large .* at most \d+ pieces"):
        train_tokenizer([corpus], 90_000, out)
    with pytest.raises(ConfigError, match=r"100 is too small.*need \d+"):
        train_tokenizer([corpus], 100, out)
    with pytest.raises(DataError, match="nowhere does not exist"):
        train_tokenizer([tmp_path / "nowhere"], 300, out)
    assert not out.exists()


def test_largest_vocab_size_from_the_error_works(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        train_tokenizer([corpus], 90_000, tmp_path / "t.model")
    limit = int(str(error.value).split("at most ")[1].split()[0])
    assert train_tokenizer([corpus], limit, tmp_path / "t.model").vocab_size == limit


def test_missing_and_invalid_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read tokenizer .*x\.model.*data_prep tokenizer"):
        Tokenizer.load(tmp_path / "x.model")
    (tmp_path / "x.model").write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"x\.model is not a SentencePiece model"):
        Tokenizer.load(tmp_path / "x.model")


def test_foreign_model_is_rejected(tmp_path: Path) -> None:
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["some words to learn from"] * 20),
        model_writer=model,
        vocab_size=20,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "x.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match="has pad, unk, bos, eos ids"):
        Tokenizer.load(tmp_path / "x.model")


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), min_size=1))
def test_characters_are_the_bytes_of_the_text_with_their_tokens(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    characters = tokenizer.characters([tokenizer.bos_id, *ids, tokenizer.eos_id])
    assert bytes(characters.ids).decode() == f" {text}"  # the first word has a space mark
    assert characters.token_positions == sorted(characters.token_positions)
    for position in set(characters.token_positions):
        pairs = zip(characters.ids, characters.token_positions, strict=True)
        of_token = [character for character, at in pairs if at == position]
        assert of_token == tokenizer.characters([ids[position - 1]]).ids
