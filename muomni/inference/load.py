"""Load the export of stage `sft`, which answers in text and speech."""

from dataclasses import dataclass
from pathlib import Path

import torch

from muomni.checkpoint.export import read_export
from muomni.config.models import OmniConfig
from muomni.data.text.chat_template import ConversationEncoder
from muomni.data.text.tokenizer import Tokenizer
from muomni.errors import UpstreamError
from muomni.models.omni import OmniModel
from muomni.run_folder import RunFolder
from muomni.training.engine.precision import pick_device, use_tf32

STAGE = "sft"


@dataclass(frozen=True, slots=True)
class Assistant:
    """A fine-tuned omni model in eval mode, with its tokenizer; `path` is its export or run folder."""

    model: OmniModel
    tokenizer: Tokenizer
    encoder: ConversationEncoder
    device: torch.device
    path: Path


def open_assistant(run: Path, tf32: bool = True) -> Assistant:
    """`load_assistant` on the first GPU, or on the CPU; the model is fp32.

    `tf32` allows TF32 in its matmuls on GPUs, several times as fast.
    """
    device = pick_device(0)
    use_tf32(tf32, "fp32", device)
    return load_assistant(run, device)


def load_assistant(run: Path, device: torch.device) -> Assistant:
    """Load the sft export of a run folder, or an export folder, strictly.

    Raises UpstreamError if it is missing, damaged, or of another stage.
    """
    folder = RunFolder(run, STAGE).export
    if not folder.is_dir() and (run / "export.json").is_file():
        folder = run
    export = read_export(folder, STAGE)
    tokenizer = Tokenizer.load(export.tokenizer_file)
    config = export.config(OmniConfig)
    if config.thinker.vocab_size != tokenizer.vocab_size:
        raise UpstreamError(
            f"the tokenizer in {export.path} has {tokenizer.vocab_size} pieces, but its model has "
            f"{config.thinker.vocab_size}; retrain stage {STAGE}"
        )
    model = OmniModel(config, with_codec=True)
    export.load_into(model)
    model.to(device).eval().requires_grad_(False)
    return Assistant(model, tokenizer, ConversationEncoder(tokenizer, config), device, folder)
