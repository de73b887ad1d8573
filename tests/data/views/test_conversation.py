"""Batches of conversations: labels, media positions, and empty slots."""

from pathlib import Path

import numpy as np
import pytest
import torch

from muomni.data.loading.loader import PlannedDataset
from muomni.data.sampling.plan import Batching, Plan
from muomni.data.shards.source import Source
from muomni.data.text.chat_template import Conversation
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.views.conversation import ConversationView
from muomni.data.views.text import IGNORE
from muomni.errors import DataError
from tests.conversations import (
    COLORS,
    color_sample,
    omni_config,
    sample,
    speech_sample,
    text_part,
    tone_sample,
    write_sft_dataset,
)
from tests.corpora import Sample

SEQ_LEN = 64


@pytest.fixture(scope="module")
def view(tokenizer: Tokenizer) -> ConversationView:
    return ConversationView(tokenizer, omni_config(tokenizer), SEQ_LEN)


def read(view: ConversationView, sample: Sample) -> Conversation:
    return view.example({"__key__": sample[0], **dict(sample[1])}, None)


def test_only_answers_and_their_eos_are_targets(
    view: ConversationView, tokenizer: Tokenizer
) -> None:
    first, second = color_sample("a", "red"), tone_sample("b", "low")
    batch = view.collate([[read(view, first), read(view, second)], []])
    predicted = batch["labels"][batch["labels"] != IGNORE].tolist()
    eos = tokenizer.eos_id
    assert predicted == [*tokenizer.encode("red"), eos, *tokenizer.encode("low"), eos]
    # Each label is the next token, also across packed conversations.
    rows, positions = torch.nonzero(batch["labels"] != IGNORE, as_tuple=True)
    for row, position in zip(rows.tolist(), positions.tolist(), strict=True):
        label = int(batch["labels"][row, position])
        if label != eos:
            assert int(batch["input_ids"][row, position + 1]) == label
    assert batch["document_ids"][0].max() == 2 and not batch["document_ids"][1].any()
    assert sorted(set(batch["answer_ids"].flatten().tolist())) == [0, 1, 2]
    assert float(batch["units"]) == len(predicted)


def test_positions_point_at_placeholders(view: ConversationView, tokenizer: Tokenizer) -> None:
    samples = [color_sample("a", "red"), tone_sample("b", "low"), color_sample("c", "blue")]
    batch = view.collate(
        [[read(view, samples[0]), read(view, samples[1])], [read(view, samples[2])]]
    )
    flat = batch["input_ids"].flatten()
    image_positions = torch.nonzero(flat == tokenizer.image_id).flatten().tolist()
    audio_positions = torch.nonzero(flat == tokenizer.audio_id).flatten().tolist()
    assert batch["image_positions"].flatten().tolist() == image_positions
    assert batch["audio_positions"].flatten().tolist() == audio_positions
    assert [tuple(image[:, 0, 0].tolist()) for image in batch["images"]] == [
        COLORS["red"], COLORS["blue"],
    ]  # fmt: skip
    assert bool(batch["sees_image"][0].any()) and bool(batch["sees_audio"][0].any())
    assert not batch["sees_audio"][1].any()


def test_batch_without_media_has_empty_slots(view: ConversationView) -> None:
    text = sample("t", [("user", [text_part("again")]), ("assistant", [text_part("again")])])
    full = view.collate(
        [[read(view, color_sample("a", "red"))], [read(view, speech_sample("s", "low"))]]
    )
    for batch in (view.collate([]), view.collate([[read(view, text)], []])):
        assert batch.keys() == full.keys()
        assert all(batch[key].dtype == full[key].dtype for key in full)
        assert batch["images"].shape[0] == batch["audios"].shape[0] == batch["speech"].shape[0] == 1
        pad_index = batch["input_ids"].numel()
        for key in ("image_positions", "audio_positions", "speech_positions"):
            assert (batch[key] == pad_index).all()
        assert not batch["speech_text_mask"].any() and int(batch["speech_lengths"]) == 0


def test_speech_slots_have_characters_and_token_positions(
    view: ConversationView, tokenizer: Tokenizer
) -> None:
    spoken = [speech_sample("a", "low"), speech_sample("b", "middle")]
    batch = view.collate([[read(view, spoken[0])], [read(view, spoken[1])]])
    flat = batch["input_ids"].flatten()
    for slot, name in enumerate(("low", "middle")):
        mask = batch["speech_text_mask"][slot]
        ids = batch["speech_text_ids"][slot][mask]
        characters = tokenizer.characters(tokenizer.encode(name))
        assert ids.tolist() == [tokenizer.encode(name)[i] for i in characters.token_positions]
        assert batch["speech_character_ids"][slot][mask].tolist() == characters.ids
        assert flat[batch["speech_positions"][slot][mask]].tolist() == ids.tolist()
    assert batch["speech_lengths"].tolist() == [6400, 6400]


def test_planned_sequences_contain_all_conversations_of_an_epoch(
    tmp_path: Path, tokenizer: Tokenizer, view: ConversationView
) -> None:
    source = Source([write_sft_dataset(tmp_path / "sft", num_each=5)], "train")
    lengths = view.lengths(source)
    plan = Plan(lengths, Batching("pack", 2, 2, seq_len=SEQ_LEN), seed=0)
    dataset = PlannedDataset(source, view, 0)
    num_answers, num_positions = 0, 0
    for step in range(plan.num_steps(1)):
        batch = dataset[plan.rank_step(step, 0, 1)[0]].tensors
        assert batch["input_ids"].shape == (2, SEQ_LEN)
        num_answers += int(batch["answer_ids"].max())
        num_positions += int((batch["document_ids"] > 0).sum())
    assert num_answers == len(source) and num_positions == int(lengths.all().sum())


def test_error_names_broken_media(tmp_path: Path, view: ConversationView) -> None:
    key, members, _ = color_sample("cat", "red")
    broken = {"__key__": key, **dict(members), "0.png": b"PNG"}
    with pytest.raises(DataError, match=r"conversation 'cat': 0\.png: broken image"):
        view.example(broken, None)
    assert np.array_equal(view.collate([[]])["labels"], view.collate([])["labels"])
