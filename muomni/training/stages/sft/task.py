"""The omni model with its two losses, and in evaluation the metrics that show what it looks at.

Beside the loss, an evaluation pass counts answers that greedy decoding gets exactly right (each token is
the likeliest given the ones before it) and repeats the loss of the answers to images and to audio clips
with the media of another conversation in the micro-batch: a model that looks must then do worse.
"""

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from muomni.config.models import OmniConfig, SpecAugmentConfig
from muomni.data.views.base import Batch
from muomni.data.views.text import IGNORE
from muomni.models.layers.moe import record_router_logits
from muomni.models.omni import MediaSlots, OmniModel, gather_places
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
        """Whether the Talker takes the Thinker's states."""
        talker = self.omni.talker
        return talker is not None and talker.config.thinker_hidden_size is not None

    def forward(self, batch: Batch) -> StageOutput:
        omni, slots = self.omni, MediaSlots.of_batch(batch)
        images = omni.image_features(slots.images)
        audios = self._heard(batch, slots)
        audio = nullcontext([]) if self.moe is None else record_router_logits(omni.thinker)
        with audio as router_logits:
            hidden = self._states(batch, slots, images, audios)
        answer = omni.thinker.loss(hidden, batch["labels"])
        speech = self._speech(batch, hidden)
        logs = {
            "answer_loss": torch.stack([answer.total.detach(), answer.weight]),
            "answer_accuracy": torch.stack([answer.num_correct, answer.weight]),
            "speech_loss": torch.stack([speech.total.detach(), speech.weight]),
            # How many a micro-batch has: what did not occur has no loss.
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

    def _heard(self, batch: Batch, slots: MediaSlots) -> Tensor:
        augmentation = self.augmentation if self.training else None
        seeds = batch["audio_seeds"]
        return self.omni.audio_features(slots.audios, slots.audio_lengths, seeds, augmentation)

    def _states(self, batch: Batch, slots: MediaSlots, images: Tensor, audios: Tensor) -> Tensor:
        embeds = self.omni.place(batch["input_ids"], slots, images, audios)
        return self.omni.thinker(inputs_embeds=embeds, **documents_of(batch))

    def _speech(self, batch: Batch, hidden: Tensor) -> TalkerLoss:
        talker = self.omni.talker
        assert talker is not None
        states = gather_places(hidden, batch["speech_places"]) if self.sees_thinker else None
        codes, code_mask = batch["codes"], batch["code_mask"]
        text = [batch[f"speech_{name}"] for name in ("text_ids", "character_ids", "text_mask")]
        output = talker(*text, codes, code_mask, thinker_hidden=states)
        return talker.loss(output, codes, code_mask)

    # -- evaluation only ---------------------------------------------------------------------------
    def _exact_matches(self, batch: Batch, hidden: Tensor) -> Sums:
        """Answers whose every token, the end included, is the likeliest one."""
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
        """Loss of the answers that follow an image (an audio clip), and how much a wrong one adds."""
        nowhere = batch["input_ids"].numel()
        logs: Sums = {}
        for kind, places in (("image", slots.image_places), ("audio", slots.audio_places)):
            labels = batch["labels"].masked_fill(~batch[f"sees_{kind}"], IGNORE)
            right = self.omni.thinker.loss(hidden, labels)
            num_real = int((places[:, 0] < nowhere).sum())
            order = torch.arange(len(places), device=places.device)
            order[:num_real] = order[:num_real].roll(1)
            media = {"image": images, "audio": audios}
            media[kind] = media[kind][order]
            # Every rank makes this pass, whether it has two to swap or not (ZeRO-3).
            swapped = self._states(batch, slots, media["image"], media["audio"])
            wrong = self.omni.thinker.loss(swapped, labels)
            can_swap = float(num_real > 1)
            logs[f"{kind}_answer_loss"] = torch.stack([right.total, right.weight])
            logs[f"{kind}_swap_gap"] = can_swap * torch.stack(
                [wrong.total - right.total, right.weight]
            )
        return logs
