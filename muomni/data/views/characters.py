"""Texts as the Talker reads them: one place a character, with the token that the character belongs to."""

from collections.abc import Sequence

import torch

from muomni.data.text.tokenizer import Spelling
from muomni.data.views.base import Batch


def pad_spelled(texts: Sequence[tuple[list[int], Spelling]], pad_id: int) -> Batch:
    """Token ids and spelling of B texts -> `text_ids`, `character_ids` and bool `text_mask` [B, Tl].

    Without any text there is one empty row.
    """
    width = max([len(spelling.characters) for _, spelling in texts], default=0)
    shape = (max(1, len(texts)), max(1, width))
    text_ids = torch.full(shape, pad_id)
    character_ids = torch.zeros(shape, dtype=torch.long)
    text_mask = torch.zeros(shape, dtype=torch.bool)
    for row, (ids, spelling) in enumerate(texts):
        place = (row, slice(len(spelling.characters)))
        text_ids[place] = torch.tensor(ids, dtype=torch.long)[spelling.places]
        character_ids[place] = torch.tensor(spelling.characters, dtype=torch.long)
        text_mask[place] = True
    return {"text_ids": text_ids, "character_ids": character_ids, "text_mask": text_mask}
