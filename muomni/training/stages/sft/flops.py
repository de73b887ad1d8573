"""FLOPs of conversation batches, depending on which parts of the omni model are trained.

Gradients flow from text answers through the Thinker to the trained parts before it, and from spoken answers
through the Talker to the Thinker if the Talker sees its states. A frozen encoder only runs forward.
"""

import torch
from torch import Tensor

from muomni.data.views.base import Batch
from muomni.models.omni import OmniModel
from muomni.models.speech.audio_encoder import num_encoder_frames
from muomni.models.speech.codec import Codec
from muomni.training.flops import (
    FlopCounter,
    PartFlops,
    StepFlops,
    audio_work,
    count_speech,
    is_trained,
    text_work,
)


def count_omni(omni: OmniModel, codec: Codec, on_cpu: bool) -> FlopCounter:
    """Return a counter for batches of `ConversationView`, given the currently frozen parts."""
    config, talker, words = omni.config, omni.talker, omni.thinker.embed_tokens.weight
    assert config.talker is not None and talker is not None
    by_documents = omni.thinker.stack.attends_by_documents
    trains_vision, trains_audio = is_trained(omni.vision_encoder), is_trained(omni.audio_encoder)
    has_images = trains_vision or is_trained(omni.image_projector)
    has_audio = trains_audio or is_trained(omni.audio_projector)
    has_stack = has_images or has_audio or words.requires_grad or is_trained(omni.thinker.stack)
    has_head = has_stack or omni.thinker.head_weight.requires_grad
    has_speech = is_trained(talker) or (config.talker.thinker_hidden_size is not None and has_stack)

    text, audio, joined = omni.thinker.flops(), omni.audio_encoder.flops(), omni.flops()
    head = PartFlops({"predictions": text.pop("predictions")}, has_head)
    stack = PartFlops(text, has_stack)
    image = PartFlops({"images": omni.vision_encoder.flops()}, trains_vision)
    image_projector = PartFlops({"images": joined.pop("images")}, has_images)
    audio_projector = PartFlops({"audio_positions": joined.pop("audio_positions")}, has_audio)
    ctc_embeddings = PartFlops(joined)
    if not config.ctc_embeddings:
        del audio["logits"]
    encoder = PartFlops(audio, trains_audio)
    speech = count_speech(talker, codec, by_documents, has_speech)

    def audio_positions(num_samples: Tensor) -> dict[str, int]:
        number = int((-(-num_encoder_frames(num_samples) // config.audio_stack)).sum())
        return {"audio_positions": number, "ctc_positions": number}

    def count(batch: Batch) -> StepFlops:
        pad_index = batch["input_ids"].numel()
        num_images = int((batch["image_positions"][:, 0] < pad_index).sum())
        images = {"images": num_images}, {"images": len(batch["images"])}
        audios, lengths = batch["audios"], batch["audio_lengths"]
        padded = torch.full_like(lengths, audios.shape[1])
        positions = audio_positions(lengths), audio_positions(padded)
        tokens = text_work(batch, on_cpu, by_documents)
        parts = (
            image(*images),
            image_projector(*images),
            encoder(*audio_work(audios, lengths, by_documents)),
            audio_projector(*positions),
            ctc_embeddings(*positions),
            stack(*tokens),
            head(*tokens),
            speech(batch["speech_text_mask"], batch["speech"], batch["speech_lengths"]),
        )
        return sum(parts, StepFlops())

    return count
