"""FLOPs of batches of conversations, by what of the omni model is trained.

Gradients flow from the answers through the Thinker to whatever is trained before it, and from the
spoken answers through the Talker to the Thinker where it sees its states. A frozen tower runs forward only.
"""

from fractions import Fraction

from torch import nn

from muomni.config.models import FRAME_SUBSAMPLING, MEL_HOP, CodecConfig
from muomni.data.views.base import Batch
from muomni.models.layers.flops import ForwardFlops
from muomni.models.layers.recompute import recomputed_share
from muomni.models.omni import (
    OmniModel,
    audio_projector_flops,
    image_projector_flops,
    spelling_flops,
)
from muomni.models.vision.vision_encoder import vision_encoder_flops
from muomni.training.flops import (
    KEPT,
    AudioClips,
    FlopCounter,
    PackedRows,
    Speech,
    StepFlops,
    Training,
    mel_lengths,
    trained_share,
)


def count_omni(omni: OmniModel, codec: CodecConfig, on_cpu: bool) -> FlopCounter:
    """Counts batches of `ConversationView` for a model as it is frozen and recomputed now."""
    plan = _Plan(omni)
    config = omni.config
    assert config.talker is not None and omni.talker is not None
    again_vision, again_audio, again_thinker, again_talker = (
        recomputed_share(part)
        for part in (omni.vision_encoder, omni.audio_encoder, omni.thinker, omni.talker)
    )
    by_documents = omni.thinker.stack.attends_by_documents
    rows = PackedRows(config.thinker, again_thinker, on_cpu, plan.stack, plan.head, by_documents)
    audio_clips = AudioClips(
        config.audio_encoder, again_audio, plan.audio, config.ctc_embeddings, by_documents
    )
    speech = Speech(config.talker, codec, again_talker, plan.talker, by_documents)

    def image(recomputed: Fraction) -> int:
        tower = plan.vision.hardware(vision_encoder_flops(config.vision_encoder), recomputed)
        return tower + plan.image_projector.model(image_projector_flops(config))

    def after_audio(num_mel: int) -> int:
        num_frames = -(-num_mel // FRAME_SUBSAMPLING)
        projector = plan.audio_projector.model(audio_projector_flops(config, num_frames))
        spelling = plan.looked_up(spelling_flops(config, num_frames))
        return projector + plan.spelling.model(spelling)

    def count(batch: Batch) -> StepFlops:
        nowhere = batch["input_ids"].numel()
        num_images = int((batch["image_positions"][:, 0] < nowhere).sum())
        width = -(-batch["audios"].shape[1] // MEL_HOP)
        media = StepFlops(
            num_images * image(KEPT) + sum(map(after_audio, mel_lengths(batch["audio_lengths"]))),
            len(batch["images"]) * image(again_vision) + len(batch["audios"]) * after_audio(width),
        )
        heard = audio_clips(batch["audios"], batch["audio_lengths"])
        text = rows(batch["document_ids"], int(batch["units"]))
        spoken = speech(batch["speech_text_mask"], batch["speech"], batch["speech_lengths"])
        return media + heard + text + spoken

    return count


class _Plan:
    """How each part of an omni model is trained: which weights get gradients, and which states."""

    def __init__(self, omni: OmniModel) -> None:
        config, thinker, talker = omni.config, omni.thinker, omni.talker
        assert config.talker is not None and talker is not None
        self.vision = Training(trained_share(omni.vision_encoder))
        audio_parts = [omni.audio_encoder.subsampling, omni.audio_encoder.stack]
        if config.ctc_embeddings:
            audio_parts.append(omni.audio_encoder.ctc_head)
        self.audio = Training(trained_share(nn.ModuleList(audio_parts)))
        self.trains_audio = self.audio.share > 0
        trains_vision, trains_audio = self.vision.share > 0, self.trains_audio
        self.image_projector = Training(trained_share(omni.image_projector), trains_vision)
        self.audio_projector = Training(trained_share(omni.audio_projector), trains_audio)
        trains_words = thinker.embed_tokens.weight.requires_grad
        self.spelling = Training(float(trains_words), trains_audio)
        before = (
            trains_words
            or trains_vision
            or trains_audio
            or self.image_projector.share > 0
            or self.audio_projector.share > 0
        )
        self.stack = Training(trained_share(thinker.stack), before)
        reaches_head = before or self.stack.share > 0
        self.head = Training(float(thinker.head_weight.requires_grad), reaches_head)
        sees = config.talker.thinker_hidden_size is not None and reaches_head
        words = (talker.embed_text, talker.embed_characters, talker.embed_codes, talker.embed_start)
        before_talker = sees or any(table.weight.requires_grad for table in words)
        self.talker = Training(trained_share(talker), before_talker)

    def looked_up(self, spelling: ForwardFlops) -> ForwardFlops:
        """Posteriors of a frozen encoder are data: they want no gradient."""
        return spelling if self.trains_audio else ForwardFlops(first=spelling.total)
