"""CTC units: labels with fewer merges than the tokenizer."""

import pytest

from muomni.data.text.ctc_units import CtcUnits
from muomni.data.text.normalization import spoken_form
from muomni.data.text.tokenizer import Tokenizer
from tests.corpora import sentences, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_tokenizer(path)
    return Tokenizer.load(path)


def test_all_merges_equal_the_tokenizer(tokenizer: Tokenizer) -> None:
    by_merging, plain = CtcUnits(tokenizer, 10**6), CtcUnits(tokenizer, None)
    for text in sentences(100, seed=5):
        assert by_merging.encode(text) == plain.encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("num_merges", [0, 5, 30, None])
def test_tokenizer_decodes_labels_of_fewer_merges(
    num_merges: int | None, tokenizer: Tokenizer
) -> None:
    units = CtcUnits(tokenizer, num_merges)
    for text in [*sentences(20, seed=6), "Xylophone — 東京!"]:
        assert tokenizer.decode(units.encode(text)) == spoken_form(text)


def test_fewer_merges_give_longer_labels_and_zero_gives_characters(tokenizer: Tokenizer) -> None:
    text = sentences(1)[0]
    lengths = [len(CtcUnits(tokenizer, n).encode(text)) for n in (0, 10, 40, None)]
    assert lengths == sorted(lengths, reverse=True) and lengths[0] > lengths[-1]
    assert lengths[0] == len(text) + 1  # and the word-start mark of the first word


def test_text_without_words_has_no_labels(tokenizer: Tokenizer) -> None:
    assert CtcUnits(tokenizer, 3).encode("?!") == [] == CtcUnits(tokenizer, None).encode("")
