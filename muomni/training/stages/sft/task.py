"""The omni model with its two losses, and evaluation metrics for grounding.

Evaluation also counts exact matches of greedy decoding (teacher-forced, so each token is the argmax given the
reference prefix), and recomputes the loss of answers to images and audio with the media of another conversation
in the packed sequence: a grounded model must do worse.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from muomni.config.models import OmniConfig, SpecAugmentConfig
from muomni.data.views.base import Batch
from muomni.data.views.text import IGNORE
from muomni.models.layers.moe import record_router_logits
from muomni.models.omni import MediaSlots, OmniModel, gather_positions
from muomni.models.speech.talker import TalkerLoss
from muomni.training.engine.attention import documents_of
from muomni.training.moe import add_router_term
from muomni.training.outputs import StageOutput, Sums

_CHUNK_TOKENS = 1024


class OmniTask(nn.Module):
    """Batches of `ConversationView` with `codes` and `code_mask` of the spoken answers."""

    def __init__(self, config: OmniConfig, augmentation: SpecAugmentConfig | None = None) -> None:
        super().__init__()
        self.omni = OmniModel(config)
        self.augmentation = augmentation
        self.moe = config.thinker.moe

    @property
    def sees_thinker(self) -> bool:
        """Whether the Talker sees the Thinker's states."""
        talker = self.omni.talker
        return talker is not None and talker.config.thinker_hidden_size is not None

    def forward(self, batch: Batch) -> StageOutput:
        omni, slots = self.omni, MediaSlots.of_batch(batch)
        images = omni.image_features(slots.images)
        audios = self._audio_features(batch, slots)
        recorder = nullcontext([]) if self.moe is None else record_router_logits(omni.thinker)
        with recorder as router_logits:
            hidden = self._states(batch, slots, images, audios)
        answer = omni.thinker.loss(hidden, batch["labels"])
        speech = self._speech(batch, hidden)
        logs = {
            "answer_loss": torch.stack([answer.total.detach(), answer.weight]),
            "answer_accuracy": torch.stack([answer.num_correct, answer.weight]),
            "speech_loss": torch.stack([speech.total.detach(), speech.weight]),
            # Predictions per micro-batch: without any, there is no speech loss.
            "speech_predictions": torch.stack([speech.weight, torch.ones_like(speech.weight)]),
            **{f"speech_{name}": pair for name, pair in speech.logs.items()},
        }
        output = StageOutput({"answer": answer.total, "speech": speech.total}, logs)
        if self.moe is not None and self.training:
            is_real = batch["document_ids"] > 0
            add_router_term(output, self.moe, omni.thinker, router_logits, is_real)
        if not self.training:
            output.logs |= self._exact_matches(batch, hidden)
            output.logs |= self._swaps(batch, slots, images, audios, hidden)
        return output

    def _audio_features(self, batch: Batch, slots: MediaSlots) -> Tensor:
        augmentation = self.augmentation if self.training else None
        seeds = batch["audio_seeds"]
        return self.omni.audio_features(slots.audios, slots.audio_lengths, seeds, augmentation)

    def _states(self, batch: Batch, slots: MediaSlots, images: Tensor, audios: Tensor) -> Tensor:
        embeds = self.omni.insert_features(batch["input_ids"], slots, images, audios)
        return self.omni.thinker(inputs_embeds=embeds, **documents_of(batch))

    def _speech(self, batch: Batch, hidden: Tensor) -> TalkerLoss:
        talker = self.omni.talker
        assert talker is not None
        states = gather_positions(hidden, batch["speech_positions"]) if self.sees_thinker else None
        codes, code_mask = batch["codes"], batch["code_mask"]
        text = [batch[f"speech_{name}"] for name in ("text_ids", "character_ids", "text_mask")]
        output = talker(*text, codes, code_mask, states, batch["speech_seeds"])
        return talker.loss(output, codes, code_mask)

    # -- evaluation only ---------------------------------------------------------------------------
    def _exact_matches(self, batch: Batch, hidden: Tensor) -> Sums:
        """Count answers whose every token, including the end, is the argmax."""
        is_label = batch["labels"] != IGNORE
        answer_ids, labels = batch["answer_ids"][is_label], batch["labels"][is_label]
        guesses = [
            self.omni.thinker.logits(states).argmax(-1)
            for states in hidden[is_label].split(_CHUNK_TOKENS)
        ]
        is_hit = (torch.cat(guesses) == labels).float()
        num_answers = batch["answer_ids"].max() + 1
        sizes = torch.zeros(int(num_answers), device=hidden.device)
        hits = sizes.scatter_add(0, answer_ids, is_hit)
        sizes = sizes.scatter_add(0, answer_ids, torch.ones_like(is_hit))
        is_exact = (hits == sizes) & (sizes > 0)
        return {"exact_match": torch.stack([is_exact.sum().float(), (sizes > 0).sum().float()])}

    def _swaps(
        self, batch: Batch, slots: MediaSlots, images: Tensor, audios: Tensor, hidden: Tensor
    ) -> Sums:
        """Return the loss of answers to images (audio), and its increase with swapped media.

        Media are swapped among the conversations of a packed sequence, so that the result does not depend on
        the micro-batch. Sequences with a single image (audio clip) have no gap.
        """
        num_sequences, length = batch["input_ids"].shape
        logs: Sums = {}
        for kind, positions in (("image", slots.image_positions), ("audio", slots.audio_positions)):
            labels = batch["labels"].masked_fill(~batch[f"sees_{kind}"], IGNORE)
            right = self.omni.thinker.loss(hidden, labels)
            logs[f"{kind}_answer_loss"] = torch.stack([right.total, right.weight])
            sequences = positions[:, 0] // length  # ascending; `num_sequences` for empty slots
            media = {"image": images, "audio": audios}
            media[kind] = media[kind][_rotate_within(sequences)]
            # Every rank runs this pass, even without media to swap (otherwise ZeRO-3 collectives deadlock).
            swapped = self._states(batch, slots, media["image"], media["audio"])
            counts = sequences.bincount(minlength=num_sequences)[:num_sequences]
            labels = labels.masked_fill(counts[:, None] < 2, IGNORE)
            right, wrong = (self.omni.thinker.loss(states, labels) for states in (hidden, swapped))
            logs[f"{kind}_swap_gap"] = torch.stack([wrong.total - right.total, right.weight])
        return logs


def _rotate_within(groups: Tensor) -> Tensor:
    """Indices [N] that rotate the elements of each group by one; `groups` [N] is ascending."""
    indices = torch.arange(len(groups), device=groups.device)
    last = torch.searchsorted(groups, groups, right=True) - 1
    is_first = torch.searchsorted(groups, groups) == indices
    return torch.where(is_first, last, indices - 1)
