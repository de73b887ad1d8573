"""Contrastive losses of a full step in one matrix, and from the micro-batches of ranks."""

from pathlib import Path

import torch

from muomni.config.run import RunConfig
from muomni.data.loading.loader import PlannedDataset
from muomni.data.views.base import Batch
from muomni.distributed import collectives
from muomni.distributed.discovery import discover
from muomni.training.session import Request, Session, prepare, seed_everything
from muomni.training.stages.vision_encoder import VisionEncoderTask
from tests.models.vision import textbook_losses

Gradients = dict[str, torch.Tensor]


def open_session(config: RunConfig) -> Session:
    return prepare(Request(config, Path(), Path(), {}, "never"), discover({}))


def build_task(session: Session) -> VisionEncoderTask:
    task = session.stage.build()
    assert isinstance(task, VisionEncoderTask)
    return task


def first_step(session: Session) -> list[Batch]:
    """The micro-batches of all ranks in the first step."""
    dataset = PlannedDataset(session.planned.source, session.stage.view(), 0)
    return [dataset[micro].tensors for micro in session.planned.plan.rank_step(0, 0, 1)]


def full_step(config: RunConfig) -> tuple[float, Gradients]:
    """Mean loss and gradients of the first step, all its pairs in one graph."""
    session = open_session(config)
    seed_everything(0)
    task = build_task(session)
    loss = textbook_loss(task, first_step(session))
    loss.backward()
    return loss.item(), gradients_of(task)


def step_of_rank(config: RunConfig) -> tuple[float, Gradients]:
    """The same from the micro-batches of this rank, summed over all ranks."""
    session = open_session(config)
    stage, batches = session.stage, first_step(session)
    weight = sum(stage.loss_denominators(batch)["loss"] for batch in batches)
    local = batches[collectives.rank() :: collectives.world_size()]
    seed_everything(0)
    task = build_task(session)
    total = torch.zeros(())
    for batch in stage.begin_step(task, local):
        loss = task(batch).losses["loss"] / weight
        loss.backward()
        total += loss.detach()
    gradients = gradients_of(task)
    for gradient in gradients.values():
        collectives.sum_over_ranks(gradient)
    return collectives.sum_over_ranks(total).item(), gradients


def gradients_of(task: torch.nn.Module) -> Gradients:
    return {name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None}


def textbook_loss(task: VisionEncoderTask, batches: list[Batch]) -> torch.Tensor:
    """Mean loss of all pairs at once: the sigmoid loss for a model with a bias, else InfoNCE."""
    outputs = [task.clip(b["images"], b["token_ids"], b["token_lengths"]) for b in batches]
    positive = textbook_losses.positives(torch.cat([batch["groups"] for batch in batches]))
    assert positive.sum() > len(positive), "the step has no equal pairs"
    logits = outputs[0].scale * (
        torch.cat([o.image for o in outputs]) @ torch.cat([o.text for o in outputs]).T
    )
    if outputs[0].bias is not None:
        return textbook_losses.sigmoid(logits + outputs[0].bias, positive) / len(positive)
    return textbook_losses.infonce(logits, positive) / len(positive)
