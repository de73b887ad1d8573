"""One file a stage; `load_stage` is the only table of them."""

from importlib import import_module

from muomni.training.stage import Stage

_CLASSES = {
    "thinker": ("thinker", "ThinkerStage"),
    "audio_encoder": ("audio_encoder", "AudioEncoderStage"),
    "vision_encoder": ("vision_encoder", "VisionEncoderStage"),
    "codec": ("codec", "CodecStage"),
    "talker": ("talker", "TalkerStage"),
    "sft": ("sft.stage", "SftStage"),
}


def load_stage(name: str) -> type[Stage]:
    """The class of a stage; its module is imported only when the stage is used."""
    module, class_name = _CLASSES[name]
    return getattr(import_module(f"muomni.training.stages.{module}"), class_name)
