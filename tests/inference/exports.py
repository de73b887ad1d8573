"""An sft export of a toy model, untrained or briefly trained."""

from pathlib import Path
from typing import Any

import torch

from muomni.checkpoint.export import write_export
from muomni.data.text.tokenizer import Tokenizer
from muomni.models.omni import MediaSlots, OmniModel
from tests.conversations import COLORS, color_sample, omni_config
from tests.corpora import write_tokenizer


def write_sft_export(run: Path, num_steps: int = 0, **changes: Any) -> OmniModel:
    """Write RUN/sft/export and return its model, trained for `num_steps` to name colors."""
    from muomni.data.views.conversation import ConversationView

    run.mkdir(parents=True, exist_ok=True)
    write_tokenizer(run / "tokenizer.model")
    tokenizer = Tokenizer.load(run / "tokenizer.model")
    torch.manual_seed(0)
    config = omni_config(tokenizer, **changes)
    model = OmniModel(config, with_codec=True)
    if model.codec is not None:
        model.codec.quantizer.codebooks.normal_(std=0.1)
    view = ConversationView(tokenizer, config, 32)
    samples = [color_sample(name, name) for name in COLORS]
    batch = view.collate([[view.example({"__key__": k, **dict(m)}, None)] for k, m, _ in samples])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(num_steps):
        hidden = model(batch["input_ids"], MediaSlots.of_batch(batch), batch["document_ids"])
        loss = model.thinker.loss(hidden, batch["labels"])
        (loss.total / loss.weight).backward()
        optimizer.step()
        optimizer.zero_grad()
    folder = run / "sft" / "export"
    folder.parent.mkdir(parents=True, exist_ok=True)
    write_export(folder, "sft", model.state_dict(), config, tokenizer, {}, {"preset": "nano"})
    return model.eval()
