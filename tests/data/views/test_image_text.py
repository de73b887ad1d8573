import json
from pathlib import Path

import numpy as np
import pytest

from muomni.config.models import Augmentation
from muomni.data.sampling.order import generator
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.image_text import CAPTION, IMAGE, NO_GROUP, ImageTextView
from muomni.errors import DataError
from tests.corpora import write_tokenizer
from tests.media_corpora import image


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_tokenizer(path)
    return Tokenizer.load(path)


@pytest.fixture(scope="module")
def view(tokenizer: Tokenizer) -> ImageTextView:
    return ImageTextView(tokenizer, 32, 24, Augmentation(min_scale=0.5, max_scale=1.0))


def sample(key: str = "k1", color: str = "red") -> dict[str, object]:
    return {
        "__key__": key,
        "png": image(color, "square"),
        "json": b'{"captions": ["a red door", "the cat", "the old river"]}',
    }


def decoded(view: ImageTextView, ids: list[int]) -> str:
    return view.tokenizer.decode(ids)


def test_training_samples_a_caption_and_evaluation_takes_the_first(view: ImageTextView) -> None:
    seen = {
        decoded(view, view.example(sample(), generator(0, epoch, 1)).ids) for epoch in range(20)
    }
    assert seen == {"a red door", "the cat", "the old river"}
    pair = view.example(sample(), None)
    assert decoded(view, pair.ids) == "a red door"
    assert (pair.ids[0], pair.ids[-1]) == (view.tokenizer.bos_id, view.tokenizer.eos_id)


def test_truncated_caption_keeps_its_eos(view: ImageTextView) -> None:
    ids = view.token_ids("the old river " * 20)
    assert len(ids) == 24 and ids[-1] == view.tokenizer.eos_id


def test_transparent_and_uncovered_pixels_are_white(view: ImageTextView) -> None:
    plain = view.example(sample(), None).pixels
    assert plain.shape == (3, 32, 32) and plain.dtype == np.uint8
    assert plain[:, 0, 0].tolist() == [255, 255, 255]
    red = [
        ((p := view.example(sample(), generator(0, epoch, 1)).pixels)[0] > 200) & (p[1] < 80)
        for epoch in range(12)
    ]
    areas = [int(mask.sum()) for mask in red]
    centers = {tuple(np.argwhere(mask).mean(0).round()) for mask in red}
    whole = int(((plain[0] > 200) & (plain[1] < 80)).sum())
    assert min(areas) < 0.6 * whole and max(areas) <= whole + 2 * 32 and len(centers) > 6


def test_same_generator_gives_the_same_pair(view: ImageTextView) -> None:
    first, again = (view.example(sample(), generator(4, 2, 9)) for _ in range(2))
    assert (first.pixels == again.pixels).all() and first.ids == again.ids


def test_flip_probability(tokenizer: Tokenizer) -> None:
    lopsided = sample()
    lopsided["png"] = image("blue", "square", offset=-6)
    fixed = {"min_scale": 1.0, "max_scale": 1.0}
    plain = ImageTextView(tokenizer, 32, 24, None).example(lopsided, generator(0, 0, 0)).pixels
    for share, expected in ((0.0, plain), (1.0, plain[:, :, ::-1])):
        view = ImageTextView(tokenizer, 32, 24, Augmentation(flip_probability=share, **fixed))
        assert (view.example(lopsided, generator(0, 0, 0)).pixels == expected).all()


@pytest.mark.parametrize(
    ("captions", "color", "shared"),
    [
        (["a red door", "the cat", "the old river"], "red", {"image", "caption", "captions"}),
        (["A red  Door "], "blue", {"caption"}),
        (["the cat", "a red door", "The Old River"], "blue", {"captions"}),
        (["the cat", "the old river"], "red", {"image"}),
        (["the cat"], "blue", set()),
    ],
)
def test_equal_images_captions_and_sets_of_captions_share_a_group(
    captions: list[str], color: str, shared: set[str], view: ImageTextView
) -> None:
    other = {**sample("b", color), "json": json.dumps({"captions": captions}).encode()}
    pairs = view.example(sample("a"), None), view.example(other, None)
    assert min(group for pair in pairs for group in pair.groups) >= 0
    equal = [a == b for a, b in zip(*(pair.groups for pair in pairs), strict=True)]
    assert equal == [name in shared for name in ("image", "caption", "captions")]


def test_groups_are_of_the_sampled_caption_and_the_unaugmented_image(view: ImageTextView) -> None:
    pairs = [view.example(sample(), generator(0, epoch, 1)) for epoch in range(20)]
    captions = {decoded(view, pair.ids): pair.groups[CAPTION] for pair in pairs}
    assert len(captions) == len(set(captions.values())) == 3
    assert len({pair.groups[IMAGE] for pair in pairs}) == 1


def test_empty_sequences_become_padding_pairs_at_the_end(view: ImageTextView) -> None:
    pair = view.example(sample(), None)
    batch = view.collate([[pair], [], [pair]])
    assert batch["images"].shape == (3, 3, 32, 32) and batch["units"] == 2
    assert (batch["groups"] == NO_GROUP).all(1).tolist() == [False, False, True]
    empty = view.collate([[], [], []])
    assert empty.keys() == batch.keys() and (empty["groups"] == NO_GROUP).all()
    assert empty["images"].shape == batch["images"].shape and empty["units"] == 0


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"__key__": "k9", "png": b"x", "txt": b"t"}, "k9.png"),
        ({"__key__": "k9", "txt": b"t"}, "'k9' has no image"),
        ({"__key__": "k9", "png": image("red", "bar")}, "'k9' has no text"),
        ({"__key__": "k9", "json": b"[1]", "png": b""}, "'k9': its .json is not a JSON object"),
    ],
)
def test_error_names_an_unusable_sample(
    broken: dict[str, object], message: str, view: ImageTextView
) -> None:
    with pytest.raises(DataError, match=message):
        view.example(broken, None)


def test_caption_falls_back_to_the_text_member(view: ImageTextView, tmp_path: Path) -> None:
    pair = view.example({"__key__": "k", "png": image("red", "bar"), "txt": b"the cat"}, None)
    assert decoded(view, pair.ids) == "the cat"
