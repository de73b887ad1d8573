"""Near-duplicates: no near pair is missed, and different images and texts are distinguished."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

from data_prep.curation.near_duplicates import (
    bit_distance,
    image_signature,
    near_duplicate_images,
    near_duplicate_texts,
    plain_words,
    text_signature,
)
from tests.corpora import sentences


def _drawing(seed: int, size: int = 200) -> Image.Image:
    random = np.random.default_rng(seed)
    image = Image.new("RGB", (size, size), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(8):
        corner, extent = (
            random.integers(0, size * 3 // 4, 2),
            random.integers(size // 8, size // 3, 2),
        )
        draw.rectangle(
            [*corner, *(corner + extent)], fill=tuple(map(int, random.integers(256, size=3)))
        )
    return image


def _encoded(image: Image.Image, kind: str = "PNG", **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _look(data: bytes) -> tuple[int, np.ndarray]:
    look = image_signature(data)
    assert look is not None
    return look


def _are_alike(first: bytes, second: bytes) -> bool:
    looks = [_look(first), _look(second)]
    hashes = np.array([look[0] for look in looks], np.uint64)
    return len(near_duplicate_images(hashes, np.stack([look[1] for look in looks]), 4)) > 0


@settings(deadline=None, max_examples=60)
@given(
    base=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=8),
    flips=st.lists(
        st.tuples(st.integers(0, 7), st.sets(st.integers(0, 63), max_size=6)), max_size=8
    ),
    distance=st.integers(0, 5),
)
def test_no_near_pair_is_missed(
    base: list[int], flips: list[tuple[int, set[int]]], distance: int
) -> None:
    near = [base[which % len(base)] ^ sum(1 << bit for bit in bits) for which, bits in flips]
    hashes = np.array(base + near, np.uint64)
    found = near_duplicate_images(hashes, np.zeros((len(hashes), 3), np.uint8), distance)
    linked = _components(len(hashes), found)
    close = [
        (one, other)
        for one in range(len(hashes))
        for other in range(one)
        if int(bit_distance(hashes[one], hashes[other])[0]) <= distance
    ]
    assert linked == _components(len(hashes), np.array(close).reshape(-1, 2))


def _components(num: int, pairs: np.ndarray) -> list[int]:
    labels = list(range(num))
    for one, other in pairs:
        low, high = sorted((labels[one], labels[other]))
        labels = [low if label == high else label for label in labels]
    return labels


@pytest.mark.parametrize("seed", range(6))
def test_reencoded_image_is_near_duplicate(seed: int) -> None:
    image = _drawing(seed)
    original = _encoded(image)
    assert _are_alike(original, _encoded(image, "JPEG", quality=60))
    assert _are_alike(original, _encoded(image.resize((90, 90))))
    assert not _are_alike(original, _encoded(_drawing(seed + 100)))
    assert not _are_alike(original, _encoded(image.rotate(90)))


def test_color_and_uniform_images() -> None:
    dots = []
    for color in ("orange", "deepskyblue"):
        dot = Image.new("RGB", (100, 100), "white")
        ImageDraw.Draw(dot).ellipse([40, 40, 60, 60], fill=color)
        dots.append(_encoded(dot))
    assert not _are_alike(*dots)
    assert image_signature(_encoded(Image.new("RGB", (50, 50), "red"))) is None


def test_texts_that_differ_in_one_word() -> None:
    texts = [" ".join(sentences(20, seed)) for seed in range(30)]
    texts += [texts[3].replace("morning", "evening", 1), texts[7].upper() + "!", "short"]
    words = [plain_words(text) for text in texts]
    signatures = [text_signature(each) for each in words]
    assert signatures.pop() is None
    pairs = near_duplicate_texts(np.stack([each for each in signatures if each is not None]), 0.8)
    assert {tuple(sorted(pair)) for pair in pairs.tolist()} == {(3, 30), (7, 31)}


def test_equal_minima_estimate_jaccard_similarity() -> None:
    random = np.random.default_rng(0)
    characters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    one, other, common = ("".join(random.choice(characters, 4000)) for _ in range(3))
    first, second = text_signature(common + one), text_signature(common + other)
    assert first is not None and second is not None
    assert abs((first == second).mean() - 1 / 3) < 0.13


def test_plain_words() -> None:
    assert plain_words("  The ﬁrst—“Dog’s” café!\n") == "the first dog s café"
    assert plain_words("soft\u00adhyphen می\u200cخواهم") == "softhyphen میخواهم"
    assert plain_words("की") != plain_words("का")
    assert plain_words("cafe\u0301") == plain_words("CAFÉ")
