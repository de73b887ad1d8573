"""The Thinker: a decoder LM with exactly Qwen3's architecture, dense or mixture of experts.

RMSNorm, rotary positions, grouped-query attention with QK-norm, SwiGLU, no biases. The forward pass
returns hidden states: losses apply the output head in chunks, generation only at the last position.
Reference in tests: transformers' Qwen3ForCausalLM and Qwen3MoeForCausalLM.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from muomni.config.models import ThinkerConfig
from muomni.models.layers.attention import Documents, StackOptions
from muomni.models.layers.flops import Flops, weight_flops
from muomni.models.layers.kv_cache import KVCache
from muomni.models.layers.losses import LossSum, next_token_loss
from muomni.models.layers.masks import (
    document_mask,
    document_positions,
    window_mask,
    window_size,
)
from muomni.models.layers.transformer import TransformerStack, init_weights


class Thinker(nn.Module):
    """Token ids or embeddings in, hidden states [B, T, hidden_size] out."""

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        options = StackOptions(
            rope_theta=config.rope_theta, norm_eps=config.norm_eps, moe=config.moe
        )
        self.stack = TransformerStack(config, options)
        if not config.tie_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        init_weights(self, config.num_layers)

    @property
    def head_weight(self) -> Tensor:
        """Weights [vocab_size, hidden_size] of the output head; the embeddings if tied."""
        return self.embed_tokens.weight if self.config.tie_embeddings else self.lm_head.weight

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token ids [B, T] -> embeddings [B, T, hidden_size]."""
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        document_ids: Tensor | None = None,
        document_starts: Tensor | None = None,
        longest_document: int | None = None,
        positions: Tensor | None = None,
        mask: Tensor | None = None,
        cache: KVCache | None = None,
        valid: Tensor | None = None,
    ) -> Tensor:
        """Normed hidden states [B, T, hidden_size] for the head.

        Pass `input_ids` [B, T] or `inputs_embeds` [B, T, hidden_size]. `document_ids` [B, T] (0 =
        padding, 1.. = documents) hide documents from each other and restart positions in each; a stack
        with `attends_by_documents` also takes `document_starts` (`attention.Documents.starts`) and an upper
        bound on their lengths, `longest_document`, by default T. Without
        them or a complete `mask`, attention is causal over the sequence. With `cache`, `valid` [B, T]
        marks the real ones among the new tokens. Raises ValueError when inputs conflict.
        """
        if input_ids is not None and inputs_embeds is None:
            x = self.embed(input_ids)
        elif inputs_embeds is not None and input_ids is None:
            x = inputs_embeds.to(self.stack.dtype)
        else:
            raise ValueError("pass either input_ids or inputs_embeds")
        if document_ids is not None:
            if mask is not None or cache is not None:
                raise ValueError("document_ids build the mask; pass neither a mask nor a cache")
            positions = document_positions(document_ids) if positions is None else positions
            if self.stack.attends_by_documents and document_starts is not None:
                longest = longest_document or document_ids.shape[1]
                documents = Documents(document_starts, min(longest, document_ids.shape[1]))
                return self.stack(x, positions=positions, documents=documents)
            # Free on CPUs; on an accelerator, reading the data would synchronize.
            size = window_size(document_ids) if document_ids.is_cpu else None
            if size is not None:
                windows = window_mask(document_ids, size)
                return self.stack(x, positions=positions, windows=windows)
            mask = document_mask(document_ids)
        return self.stack(x, positions=positions, mask=mask, cache=cache, valid=valid)

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., hidden_size] -> logits [..., vocab_size]."""
        return F.linear(hidden, self.head_weight)

    def loss(self, hidden: Tensor, labels: Tensor) -> LossSum:
        """Next-token loss for `labels` [B, T], already shifted; -100 is ignored."""
        return next_token_loss(hidden, labels, self.head_weight)

    def new_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty KV cache for `max_length` positions."""
        return self.stack.new_cache(batch_size, max_length)

    def flops(self) -> dict[str, Flops]:
        """FLOPs per position, per query-key pair, and per prediction of the head."""
        position, pair = self.stack.flops()
        head = weight_flops(self.head_weight)
        return {"positions": position, "pairs": pair, "predictions": head}
