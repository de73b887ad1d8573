"""The omni model: positions of features, modules that always run, answers that depend on media."""

from pathlib import Path
from typing import Any

import pytest
import torch

from muomni.data.text.chat_template import ConversationEncoder
from muomni.data.text.tokenizer import Tokenizer
from muomni.data.text.turns import Part, Turn
from muomni.data.views.base import Batch
from muomni.data.views.conversation import ConversationView, media_slots
from muomni.models.omni import MediaSlots, OmniModel, Projector, gather_positions
from muomni.models.speech.ctc import BLANK_ID
from muomni.models.speech.speech_output import speak
from tests.conversations import (
    COLORS,
    SIZES,
    TONES,
    color_sample,
    omni_config,
    png,
    speech_sample,
    tone,
    tone_sample,
)
from tests.corpora import Sample, write_tokenizer
from tests.models.gradients import grad

MEDIA = {"0.png": png(COLORS["red"]), "1.png": png(COLORS["blue"]), "2.wav": tone(200, 0.55)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    write_tokenizer(path)
    return Tokenizer.load(path)


@pytest.fixture()
def model(tokenizer: Tokenizer) -> OmniModel:
    torch.manual_seed(0)
    return OmniModel(omni_config(tokenizer))


def collate(tokenizer: Tokenizer, samples: list[Sample], context: int = 40) -> Batch:
    """One sample per sequence."""
    view = ConversationView(tokenizer, omni_config(tokenizer), context)
    return view.collate(
        [[view.example({"__key__": key, **dict(members)}, None)] for key, members, _ in samples]
    )


def answer_loss(model: OmniModel, batch: Batch) -> torch.Tensor:
    hidden = model(batch["input_ids"], MediaSlots.of_batch(batch), batch["document_ids"])
    loss = model.thinker.loss(hidden, batch["labels"])
    return loss.total / loss.weight


def test_features_replace_placeholders_only(model: OmniModel, tokenizer: Tokenizer) -> None:
    batch = collate(tokenizer, [color_sample("a", "red"), tone_sample("b", "low")])
    slots = MediaSlots.of_batch(batch)
    embeds = model.embed(batch["input_ids"], slots)
    text = model.thinker.embed(batch["input_ids"])
    is_image = batch["input_ids"] == tokenizer.image_id
    is_audio = batch["input_ids"] == tokenizer.audio_id
    images = model.image_features(slots.images).flatten(0, 1)
    assert torch.equal(embeds[is_image], images)
    audios = model.audio_features(slots.audios, slots.audio_lengths).flatten(0, 1)
    assert torch.equal(embeds[is_audio], audios)
    rest = ~(is_image | is_audio)
    assert torch.equal(embeds[rest], text[rest])


def test_every_patch_has_its_own_position(model: OmniModel, tokenizer: Tokenizer) -> None:
    """An image whose quarters differ gives four different embeddings, not one vector."""
    pixels = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    for i, color in enumerate(COLORS.values()):
        row, column = 16 * (i // 2), 16 * (i % 2)
        block = torch.tensor(color, dtype=torch.uint8)[:, None, None]
        pixels[0, :, row : row + 16, column : column + 16] = block
    features = model.image_features(pixels)[0]
    assert features.shape == (4, 32)
    assert torch.pdist(features).min() > 1e-3


@pytest.mark.parametrize("std", [0.02, 0.3])
def test_features_start_with_the_requested_std(std: float) -> None:
    torch.manual_seed(0)
    projector = Projector(48, 64, 32)
    projector.start_at(std)
    assert float(projector(5 * torch.randn(2000, 48)).detach().std()) == pytest.approx(
        std, rel=0.15
    )


def test_a_padded_batch_of_audio_clips_equals_single_ones(
    model: OmniModel, tokenizer: Tokenizer
) -> None:
    model.eval()
    encoder = ConversationEncoder(tokenizer, model.config)
    turn = Turn("user", (Part("audio", "0.wav"),))
    made = [encoder.prompt([turn], {"0.wav": tone(300, s)}) for s in (0.2, 0.61)]
    together = media_slots([(0, made[0]), (100, made[1])], encoder, 200)
    features = model.audio_features(together["audios"], together["audio_lengths"])
    for slot, single in enumerate(made):
        alone = media_slots([(0, single)], encoder, 100)
        expected = model.audio_features(alone["audios"], alone["audio_lengths"])[0]
        num_tokens = single.audios[0].num_tokens
        torch.testing.assert_close(features[slot, :num_tokens], expected[:num_tokens])


def test_audio_features_include_ctc_embeddings(model: OmniModel, tokenizer: Tokenizer) -> None:
    """A confident head adds the embedding of its token once per real frame."""
    slots = MediaSlots.of_batch(collate(tokenizer, [tone_sample("b", "low")]))
    silent = OmniModel(omni_config(tokenizer, ctc_embeddings=False))
    silent.load_state_dict(model.state_dict())
    head, token = model.audio_encoder.ctc_head, tokenizer.encode("a")[-1]
    head.weight.data.zero_()
    head.bias.data.zero_()
    head.bias.data[token] = 100.0
    heard = model.audio_features(slots.audios, slots.audio_lengths)
    added = heard - silent.audio_features(slots.audios, slots.audio_lengths)
    num_frames = -(-int(slots.audio_lengths[0]) // 640)
    stack = model.config.audio_stack
    per_position = torch.arange(added.shape[1]) * stack
    counts = (num_frames - per_position).clamp(0, stack)
    expected = counts[:, None] * model.thinker.embed_tokens.weight[token]
    torch.testing.assert_close(added[0], expected, atol=1e-5, rtol=1e-4)


def test_silence_is_embedded_as_padding(model: OmniModel, tokenizer: Tokenizer) -> None:
    slots = MediaSlots.of_batch(collate(tokenizer, [tone_sample("b", "low")]))
    model.audio_projector.start_at(0.0)
    head = model.audio_encoder.ctc_head
    head.weight.data.zero_()
    head.bias.data.zero_()
    head.bias.data[BLANK_ID] = 100.0
    heard = model.audio_features(slots.audios, slots.audio_lengths)[0, 0]
    silence = model.thinker.embed_tokens.weight[tokenizer.pad_id]
    torch.testing.assert_close(heard, model.config.audio_stack * silence)


@pytest.mark.parametrize("kind", ["image", "audio", "none"])
def test_every_module_is_in_the_graph_for_any_micro_batch(
    model: OmniModel, tokenizer: Tokenizer, kind: str
) -> None:
    samples = {"image": [color_sample("a", "red")], "audio": [tone_sample("b", "low")], "none": []}
    view = ConversationView(tokenizer, model.config, 40)
    rows = [[view.example({"__key__": key, **dict(m)}, None)] for key, m, _ in samples[kind]]
    batch = view.collate(rows or [[]])
    hidden = model(batch["input_ids"], MediaSlots.of_batch(batch), batch["document_ids"])
    model.thinker.loss(hidden, batch["labels"]).total.backward()
    for name, parameter in model.named_parameters():
        if name.startswith("talker."):
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        part = name.split(".")[0]
        if part.startswith(("image", "vision")) and kind != "image":
            assert not parameter.grad.any(), name
        if part.startswith("audio") and kind != "audio":
            assert not parameter.grad.any(), name
    if kind == "image":
        assert grad(model.image_projector.up_proj.weight).any()


def test_frozen_towers_run_without_gradient_and_in_evaluation_mode(
    model: OmniModel, tokenizer: Tokenizer
) -> None:
    model.vision_encoder.requires_grad_(False)
    model.train()
    assert not model.vision_encoder.training and model.audio_encoder.training
    batch = collate(tokenizer, [color_sample("a", "red")])
    answer_loss(model, batch).backward()
    assert all(p.grad is None for p in model.vision_encoder.parameters())
    assert grad(model.image_projector.up_proj.weight).any()


def test_packed_conversations_do_not_see_each_others_media(
    model: OmniModel, tokenizer: Tokenizer
) -> None:
    model.eval()
    view = ConversationView(tokenizer, model.config, 64)

    def states(first: str) -> torch.Tensor:
        made = [color_sample("a", first), color_sample("b", "green")]
        row = [view.example({"__key__": k, **dict(m)}, None) for k, m, _ in made]
        batch = view.collate([row])
        hidden = model(batch["input_ids"], MediaSlots.of_batch(batch), batch["document_ids"])
        return hidden[batch["document_ids"] == 2]

    torch.testing.assert_close(states("red"), states("blue"), atol=1e-6, rtol=0)


def swap(batch: Batch, key: str) -> Batch:
    return {**batch, key: batch[key].roll(1, 0)}


@pytest.mark.parametrize("kind", ["image", "audio"])
def test_a_trained_model_uses_image_and_audio(
    model: OmniModel, tokenizer: Tokenizer, kind: str
) -> None:
    """After a few steps on a tiny set, the wrong image or audio clip makes its answer unlikely."""
    if kind == "image":
        samples = [color_sample(name, name) for name in COLORS]
    else:
        samples = [tone_sample(name, name) for name in TONES]
    batch = collate(tokenizer, samples)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = answer_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        right = answer_loss(model, batch)
        wrong = answer_loss(model, swap(batch, "images" if kind == "image" else "audios"))
    assert right < 0.15 and wrong > right + 0.7


def test_min_new_tokens_delays_the_end(model: OmniModel, tokenizer: Tokenizer) -> None:
    model.eval()
    encoder = ConversationEncoder(tokenizer, model.config)
    prompt = encoder.prompt([Turn("user", (Part("text", "the door"),))], {})
    slots = MediaSlots.of_batch(media_slots([(0, prompt)], encoder, len(prompt.ids)))
    ids = torch.tensor([prompt.ids])
    (free,) = model.generate(ids, slots, eos_id=-1, max_new_tokens=1)
    (greedy,) = free.ids
    (ended,) = model.generate(ids, slots, eos_id=greedy, max_new_tokens=5)
    assert ended.stopped and not ended.ids
    (held,) = model.generate(ids, slots, eos_id=greedy, max_new_tokens=5, min_new_tokens=3)
    assert len(held.ids) >= 3 and greedy not in held.ids


@pytest.mark.parametrize("names", [["0.png"], ["2.wav"], ["0.png", "1.png", "2.wav"], []])
def test_cached_generation_equals_uncached(
    model: OmniModel, tokenizer: Tokenizer, names: list[str]
) -> None:
    model.eval()
    parts = [Part("audio" if name.endswith("wav") else "image", name) for name in names]
    encoder = ConversationEncoder(tokenizer, model.config)
    prompt = encoder.prompt([Turn("user", (*parts, Part("text", "the door")))], MEDIA)
    slots = media_slots([(0, prompt)], encoder, len(prompt.ids))
    (made,) = model.generate(
        torch.tensor([prompt.ids]), MediaSlots.of_batch(slots), eos_id=-1, max_new_tokens=12
    )
    ids = list(prompt.ids)
    hidden: Any = None
    with torch.no_grad():
        for _ in range(12):
            slots = media_slots([(0, prompt)], encoder, len(ids))
            hidden = model(torch.tensor([ids]), MediaSlots.of_batch(slots))
            ids.append(int(model.thinker.logits(hidden[0, -1]).argmax()))
        slots = media_slots([(0, prompt)], encoder, len(ids))
        hidden = model(torch.tensor([ids]), MediaSlots.of_batch(slots))
    assert made.ids == ids[len(prompt.ids) :] and not made.stopped
    torch.testing.assert_close(made.hidden, hidden[:, len(prompt.ids) :], atol=1e-4, rtol=1e-4)


def test_generation_stops_at_the_end_token(model: OmniModel, tokenizer: Tokenizer) -> None:
    """EOS is trained: a model that has learned an answer ends it."""
    batch = collate(tokenizer, [color_sample("a", "red")])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        answer_loss(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    encoder = ConversationEncoder(tokenizer, model.config)
    turn = Turn("user", (Part("image", "0.png"), Part("text", "the door")))
    prompt = encoder.prompt([turn], MEDIA)
    slots = MediaSlots.of_batch(media_slots([(0, prompt)], encoder, len(prompt.ids)))
    (made,) = model.generate(
        torch.tensor([prompt.ids]), slots, eos_id=tokenizer.eos_id, max_new_tokens=30
    )
    assert made.stopped and tokenizer.decode(made.ids) == "red"
    assert made.hidden.shape == (1, len(made.ids), 32)


def test_states_at_positions_and_the_pad_index() -> None:
    states = torch.arange(12.0).view(2, 3, 2)
    gathered = gather_positions(states, torch.tensor([[1, 4], [5, 6]]))
    assert gathered.tolist() == [[[2, 3], [8, 9]], [[10, 11], [0, 0]]]


def test_a_speech_frame_is_40_ms(tokenizer: Tokenizer, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = omni_config(tokenizer)
    model = OmniModel(config, with_codec=True).eval()
    assert model.talker is not None and model.codec is not None
    batch = collate(tokenizer, [speech_sample("s", "low")])
    text = [batch["speech_text_ids"][0], batch["speech_character_ids"][0]]
    hidden = torch.zeros(1, len(text[0]), SIZES["thinker"]["hidden_size"])
    speech = speak(
        model.talker, model.codec, *text, max_frames=7, temperature=1.0,
        seed=1, thinker_hidden=hidden,
    )  # fmt: skip
    num_frames = len(speech.codes)
    assert 0 < num_frames <= 7
    assert speech.waveform.shape == (num_frames * 640,) and speech.mel.shape == (num_frames * 4, 80)
    assert torch.isfinite(speech.waveform).all()
