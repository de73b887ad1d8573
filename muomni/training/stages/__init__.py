"""One file a stage; `load_stage` is the only table of them."""

from importlib import import_module

from muomni.training.stage import Stage

_CLASSES = {
    "thinker": "ThinkerStage",
    "audio_encoder": "AudioEncoderStage",
    "vision_encoder": "VisionEncoderStage",
    "codec": "CodecStage",
    "talker": "TalkerStage",
    "sft": "SftStage",
}


def load_stage(name: str) -> type[Stage]:
    """The class of a stage; its module is imported only when the stage is used."""
    return getattr(import_module(f"muomni.training.stages.{name}"), _CLASSES[name])
