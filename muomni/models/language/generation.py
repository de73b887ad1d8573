"""Text generation with the Thinker: a prompt as embeddings in, token ids and hidden states out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from muomni.models.language.thinker import Thinker
from muomni.models.layers.sampling import LoopDetector, sample


@dataclass(slots=True)
class GeneratedText:
    """Token ids of an answer without its end token, and the Thinker's states at them."""

    ids: list[int]
    hidden: Tensor  # [1, len(ids), hidden_size]
    stopped: bool  # False: truncated, at the limit or at a repetition loop


@torch.no_grad()
def generate_text(
    thinker: Thinker,
    embeds: Tensor,
    *,
    eos_id: int,
    max_new_tokens: int | Sequence[int],
    valid: Tensor | None = None,
    min_new_tokens: int = 0,
    cut_loops: bool = False,
    temperature: float = 0.0,
    generator: torch.Generator | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> list[GeneratedText]:
    """Continue the prompts `embeds` [B, T, hidden_size] until `eos_id`, at most `max_new_tokens`.

    Prompts end at the last position; `valid` [B, T] is False on left padding. `eos_id` is excluded
    from the first `min_new_tokens`. `cut_loops` truncates a repetition loop after its first cycle.
    `temperature=0` is greedy. `on_token` is called with each next token [B, 1], before loops are cut and
    also after a prompt's answer ended. Raises ValueError unless there is one limit or one per prompt.
    """
    batch_size, length = embeds.shape[:2]
    limits = [max_new_tokens] if isinstance(max_new_tokens, int) else list(max_new_tokens)
    if len(limits) not in (1, batch_size):
        raise ValueError(f"{batch_size} prompts need 1 or {batch_size} limits, got {len(limits)}")
    most = torch.tensor(limits, device=embeds.device).expand(batch_size)
    cache = thinker.new_cache(batch_size, length + max(limits))
    state = thinker(inputs_embeds=embeds, cache=cache, valid=valid)[:, -1:]
    stopped = torch.zeros(batch_size, dtype=torch.bool, device=embeds.device)
    lengths = torch.zeros_like(most)
    detector = LoopDetector(batch_size, embeds.device) if cut_loops else None
    # Empty first parts, so that a batch of empty answers can be concatenated.
    tokens, states = [torch.empty_like(most)[:, None][:, :0]], [state[:, :0]]
    for step in range(max(limits)):
        logits = thinker.logits(state)
        if step < min_new_tokens:
            logits[..., eos_id] = float("-inf")
        token = sample(logits, temperature, generator=generator)
        is_open = ~stopped & (step < most)
        stopped = stopped | is_open & (token[:, 0] == eos_id)
        is_open = is_open & ~stopped
        if not bool(is_open.any()):
            break
        lengths = lengths + is_open.long()
        if detector is not None:
            repeated = detector.num_repeated(token)
            is_loop = is_open & (repeated > 0) & (lengths >= min_new_tokens)
            kept = (lengths - repeated).clamp_min(min_new_tokens)
            lengths = torch.where(is_loop, kept, lengths)
            most = most.masked_fill(is_loop, 0)
        # Finished sequences continue until all have finished; `lengths` excludes these tokens.
        tokens.append(token)
        if on_token is not None:
            on_token(token)
        state = thinker(token, cache=cache)
        states.append(state)
    ids, hidden = torch.cat(tokens, 1), torch.cat(states, 1)
    return [
        GeneratedText(ids[index, :end].tolist(), hidden[index : index + 1, :end], is_stopped)
        for index, (end, is_stopped) in enumerate(
            zip(lengths.tolist(), stopped.tolist(), strict=True)
        )
    ]
