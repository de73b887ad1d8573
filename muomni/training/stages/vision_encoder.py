"""Stage `vision_encoder`: contrastive image-text pretraining (CLIP, SigLIP).

The loss contrasts all pairs of an optimizer step, over all ranks and micro-batches, so it is not a sum of
losses within micro-batches. With gradient accumulation, the features of all micro-batches are computed first,
without gradient, and each backward pass then uses all of them (`muomni/models/vision/contrastive.py`). With
one micro-batch per rank, features are gathered in its forward pass. docs/contrastive.md describes the cost and
the choice of loss.
"""

import itertools
from collections.abc import Callable

import torch
from torch import nn

from muomni.config.loading import validate
from muomni.config.models import ClipConfig
from muomni.config.stages import VisionEncoderRun
from muomni.data.views.base import Batch
from muomni.data.views.image_text import NO_GROUP, ImageTextView
from muomni.distributed import collectives
from muomni.errors import ConfigError
from muomni.models.vision.clip import Clip
from muomni.models.vision.contrastive import (
    GatheredFeatures,
    contrastive_surrogate,
    count_positives,
    pair_normalizers,
    sigmoid_surrogate,
)
from muomni.training.flops import FlopCounter, count_clip
from muomni.training.outputs import StageOutput, Sums
from muomni.training.stage import Stage

_FEATURES_ONLY = "features_only"
# Initial values of the sigmoid loss (Zhai et al., 2023): the bias reflects that nearly all pairs are negatives.
_SIGLIP_START = {"initial_temperature": 0.1, "initial_bias": -10.0}


class VisionEncoderTask(nn.Module):
    """Both towers and the contrastive loss: sigmoid loss for a model with a bias, else InfoNCE."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.clip = Clip(config)

    def forward(self, batch: Batch) -> StageOutput:
        output = self.clip(batch["images"], batch["token_ids"], batch["token_lengths"])
        if _FEATURES_ONLY in batch:
            features = {"image": output.image, "text": output.text, "scale": output.scale}
            return StageOutput({}, state=features)
        pool = batch
        if "all_images" not in batch:
            # Evaluation compares within this rank, so metrics do not depend on the number of ranks.
            scale = output.scale if output.bias is None else None
            pairs = (output.image, output.text, batch["groups"])
            pool = _pool(*pairs, [len(output.image)], self.training, scale)
        gathered, offset = _gathered(pool), int(pool["offset"])
        if output.bias is None:
            total, weight, logs = contrastive_surrogate(
                output.image, output.text, gathered, pool["normalizers"], offset, output.scale
            )
        else:
            total, weight, logs = sigmoid_surrogate(
                output.image, output.text, gathered, offset, output.scale, output.bias
            )
            logs["bias"] = torch.stack([output.bias.detach() * weight, weight])
        logs["loss"] = torch.stack([total.detach(), weight])
        logs["scale"] = torch.stack([output.scale.detach() * weight, weight])
        return StageOutput({"loss": total}, logs)


def _pool(
    images: torch.Tensor,
    texts: torch.Tensor,
    groups: torch.Tensor,
    sizes: list[int],
    is_shared: bool,
    scale: torch.Tensor | None,
) -> Batch:
    """Return features, groups, and numbers of positives of all pairs of a step, and for InfoNCE normalizers.

    The local pairs are those of micro-batches of `sizes` pairs. With `is_shared`, the pairs of all ranks are
    gathered; each rank must have as many. `scale` is None for the sigmoid loss. `offset` is the index of the
    first local pair, on the host. Micro-batches are processed in turn, so at most one micro-batch's
    similarities with all pairs are in memory.
    """
    gather = collectives.gather_rows if is_shared else torch.Tensor.detach
    offset = len(images) * collectives.rank() if is_shared else 0
    starts = itertools.accumulate([offset, *sizes[:-1]])
    parts = list(zip(starts, sizes, strict=True))
    all_groups = gather(groups)
    pool = {
        "all_images": gather(images),
        "all_texts": gather(texts),
        "all_groups": all_groups,
        "num_positives": gather(torch.cat([count_positives(*part, all_groups) for part in parts])),
        "offset": torch.tensor(offset),
    }
    if scale is not None:
        gathered = _gathered(pool)
        local = [pair_normalizers(*part, gathered, scale) for part in parts]
        pool["normalizers"] = gather(torch.cat(local))
    return pool


def _gathered(pool: Batch) -> GatheredFeatures:
    names = ("all_images", "all_texts", "all_groups", "num_positives")
    return GatheredFeatures(*(pool[name] for name in names))


class VisionEncoderStage(Stage):
    """Trains a vision and a text tower; both are exported."""

    config: VisionEncoderRun
    best_metric = "accuracy"
    best_is_lower = False

    def model_config(self) -> ClipConfig:
        sizes = self.config.model.model_dump(exclude_none=True)
        sizes["text"]["vocab_size"] = self.tokenizer.vocab_size
        is_sigmoid = self.config.options.loss == "siglip"
        config = validate(
            ClipConfig, {**(_SIGLIP_START if is_sigmoid else {}), **sizes}, "section 'model'"
        )
        if is_sigmoid == (config.initial_bias is None):
            raise ConfigError(
                f"options.loss={self.config.options.loss} does not support "
                f"model.initial_bias={config.initial_bias}; remove model.initial_bias"
            )
        return config

    def view(self) -> ImageTextView:
        config = self.model_config()
        return ImageTextView(
            self.tokenizer,
            config.vision.image_size,
            config.text.max_positions,
            self.config.options.augmentation,
            self.padding,
        )

    def build(self) -> VisionEncoderTask:
        return VisionEncoderTask(self.model_config())

    def model(self, task: VisionEncoderTask) -> Clip:
        return task.clip

    def flop_counter(self, task: VisionEncoderTask) -> FlopCounter:
        batch, num_ranks = self.config.batch, collectives.world_size()
        num_accumulated = -(-batch.global_samples // (batch.micro_samples * num_ranks))
        return count_clip(task.clip, num_accumulated * num_ranks, num_ranks)

    def loss_denominators(self, batch: Batch) -> Sums:
        return {"loss": (batch["groups"][:, 0] != NO_GROUP).sum().float()}

    @property
    def num_compared(self) -> int:
        """As many pairs as in a global batch, so that micro-batches do not matter."""
        return self.config.batch.global_samples

    def begin_step(
        self,
        forward: Callable[[Batch], StageOutput],
        batches: list[Batch],
        over_ranks: bool = True,
    ) -> list[Batch]:
        """With accumulation, compute the features of all micro-batches first, so that each sees all others.

        Both passes must compute the same features, so the towers may not draw random numbers.
        """
        if len(batches) == 1:
            return batches
        marker = torch.ones(())
        sizes = [len(batch["groups"]) for batch in batches]
        with torch.no_grad():
            passes = [forward({**batch, _FEATURES_ONLY: marker}).state for batch in batches]
            images, texts = (torch.cat([p[name] for p in passes]) for name in ("image", "text"))
            groups = torch.cat([batch["groups"] for batch in batches])
            scale = passes[0]["scale"] if self.config.options.loss == "clip" else None
            pool = _pool(images, texts, groups, sizes, over_ranks, scale)
        starts = torch.tensor([0, *sizes]).cumsum(0)
        return [
            {**batch, **pool, "offset": pool["offset"] + start}
            for batch, start in zip(batches, starts, strict=False)
        ]

    def metrics(self, ratios: dict[str, float]) -> dict[str, float]:
        metrics = dict(ratios)
        to_text = metrics.pop("accuracy_x_to_y")
        to_image = metrics.pop("accuracy_y_to_x")
        metrics["accuracy"] = (to_text + to_image) / 2
        return metrics
