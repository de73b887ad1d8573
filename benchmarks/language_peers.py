"""Peer language models and training loops with a Thinker's shape, for `thinker_speed.py`.

Hugging Face models need `transformers`, and its Trainer also needs `accelerate`. The plain GPT is like
nanoGPT's: LayerNorm, fused QKV, GELU, learned positions, and unchunked logits.
"""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muomni.config.models import ThinkerConfig
from muomni.config.run import OptimSection

LanguageBatch = dict[str, Tensor]


class GptBlock(nn.Module):
    """Pre-norm attention and GELU feed-forward."""

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        size, self.head_dim = config.hidden_size, config.head_dim
        self.heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        # Two matrices of this width have as many parameters as the three of SwiGLU.
        inner = 3 * config.intermediate_size // 2
        self.attention_norm, self.mlp_norm = (nn.LayerNorm(size, bias=False) for _ in range(2))
        self.qkv = nn.Linear(size, sum(self.heads) * self.head_dim, bias=False)
        self.out = nn.Linear(config.num_heads * self.head_dim, size, bias=False)
        self.up, self.down = nn.Linear(size, inner, bias=False), nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch, length, _ = x.shape
        parts = self.qkv(self.attention_norm(x)).split([h * self.head_dim for h in self.heads], 2)
        query, key, value = (
            part.view(batch, length, num, self.head_dim).transpose(1, 2)
            for part, num in zip(parts, self.heads, strict=True)
        )
        is_grouped = self.heads[0] != self.heads[1]
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=is_grouped
        )
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


class PlainGpt(nn.Module):
    """Maps token ids and labels to the mean loss; embeddings are tied as in the Thinker."""

    def __init__(self, config: ThinkerConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.tokens = nn.Embedding(config.vocab_size, size)
        self.positions = nn.Embedding(config.max_positions, size)
        self.blocks = nn.ModuleList(GptBlock(config) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(size, bias=False)
        self.head = nn.Linear(size, config.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if config.tie_embeddings:
            self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        """Token ids and shifted labels [B, T] -> mean cross entropy."""
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def hugging_face(family: str, config: ThinkerConfig) -> nn.Module:
    """`LlamaForCausalLM` or `Qwen3ForCausalLM` with the Thinker's shape and random weights."""
    import transformers

    name = {"llama": "Llama", "qwen3": "Qwen3"}[family]
    sizes = getattr(transformers, f"{name}Config")(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.max_positions,
        rope_theta=config.rope_theta,
        tie_word_embeddings=config.tie_embeddings,
        use_cache=False,
    )
    return getattr(transformers, f"{name}ForCausalLM")(sizes)


def bare_loop(
    model: nn.Module,
    loss_of: Callable[[LanguageBatch], Tensor],
    batches: list[LanguageBatch],
    num_accumulation: int,
    optim: OptimSection,
) -> Callable[[], None]:
    """Return a function that trains on all batches in plain torch: fused AdamW, gradient clipping.

    Each step accumulates `num_accumulation` batches; `loss_of` returns the mean loss of one.
    """
    # Weight decay on matrices only, as in the Thinker's parameter groups.
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, fused=True)
    model.train()

    def run() -> None:
        for number, batch in enumerate(batches, start=1):
            (loss_of(batch) / num_accumulation).backward()
            if number % num_accumulation == 0:
                nn.utils.clip_grad_norm_(model.parameters(), optim.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

    return run


class TrainerTurns:
    """Hugging Face's Trainer with DeepSpeed, which trains for one turn per call.

    It runs in its own thread, which waits between calls.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[LanguageBatch],
        num_accumulation: int,
        optim: OptimSection,
        settings: dict[str, Any],
        folder: Path,
    ) -> None:
        """A turn trains on all `batches`; `settings` are passed to TrainingArguments."""
        from transformers import Trainer, TrainingArguments

        self._turn, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        num_rows = len(batches[0]["input_ids"])
        rows = [
            {name: tensor[row] for name, tensor in batch.items()}
            for batch in batches
            for row in range(num_rows)
        ]
        arguments = TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=num_rows,
            gradient_accumulation_steps=num_accumulation,
            learning_rate=optim.lr,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            weight_decay=optim.weight_decay,
            max_grad_norm=optim.max_grad_norm,
            lr_scheduler_type="cosine",
            num_train_epochs=1_000_000,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        self._trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=rows,  # type: ignore[arg-type]  # any sequence works
            callbacks=[self._pause_after(len(batches) // num_accumulation)],
        )
        self._is_closing = False
        self._thread = threading.Thread(target=self._train, daemon=True)
        self._thread.start()

    def __call__(self) -> None:
        self._turn.release()
        self._done.acquire()
        if self._error is not None:
            raise RuntimeError("Hugging Face's Trainer failed") from self._error

    def close(self) -> None:
        """End the training after one more turn."""
        self._is_closing = True
        self._turn.release()
        self._thread.join()

    def _train(self) -> None:
        self._turn.acquire()
        try:
            self._trainer.train()
        except BaseException as error:
            self._error = error
        self._done.release()

    def _pause_after(self, num_steps: int) -> Any:
        from transformers import TrainerCallback

        turns = self

        class Pause(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if state.global_step % num_steps:
                    return
                turns._done.release()
                turns._turn.acquire()
                control.should_training_stop = turns._is_closing

        return Pause()


def padded_batches(
    documents: Iterator[list[int]], num_rows: int, num_batches: int, width: int | None, pad_id: int
) -> list[LanguageBatch]:
    """One document per row, padded to `width` or to the longest of the batch, as collators do."""
    batches = []
    for _ in range(num_batches):
        rows = [torch.tensor(next(documents)) for _ in range(num_rows)]
        shape = (num_rows, width or max(map(len, rows)))
        batch = {
            "input_ids": torch.full(shape, pad_id),
            "labels": torch.full(shape, -100),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        for number, ids in enumerate(rows):
            batch["input_ids"][number, : len(ids)] = ids
            batch["labels"][number, : len(ids)] = ids  # Hugging Face models shift the labels
            batch["attention_mask"][number, : len(ids)] = 1
        batches.append(batch)
    return batches
