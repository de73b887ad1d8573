"""Set up a training loop from a run config, and check everything before the first step.

Most errors are raised before a process group starts: an invalid config, a conflicting DeepSpeed JSON, or a
missing dataset or upstream export.
"""

import logging
import os
import random
import socket
import warnings
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from muomni.checkpoint import file_list, store
from muomni.checkpoint.export import Export, read_export
from muomni.checkpoint.store import Topology, TrainState
from muomni.config.registry import load, stage_spec
from muomni.config.run import RunConfig, StreamSection
from muomni.data.loading.stream import STREAM_VERSION, check_local, fingerprint, stream_shards
from muomni.data.sampling.plan import batching_of
from muomni.data.shards.datasets import open_datasets, open_tokenizer
from muomni.data.shards.source import Source
from muomni.data.text.tokenizer import Tokenizer
from muomni.distributed import collectives, compiler
from muomni.distributed.discovery import Ranks, job_name
from muomni.errors import CheckpointError, ConfigError, UpstreamError
from muomni.io.hashing import sha256_bytes
from muomni.io.live_line import styled
from muomni.io.paths import portable
from muomni.models.layers.blocks import compile_blocks
from muomni.observe.announce import Startup, row
from muomni.observe.recorder import build_recorders
from muomni.observe.tracking.facts import flatten
from muomni.run_folder import RunFolder, provenance
from muomni.training import preflight
from muomni.training.engine import attention, expert_parallel
from muomni.training.engine.ds_config import zero_stage
from muomni.training.engine.precision import (
    describe_precision,
    pick_device,
    pick_precision,
    use_tf32,
)
from muomni.training.feed import (
    Feed,
    PlannedFeed,
    Reading,
    StreamFeed,
    dataset_facts,
    digest_of,
    num_workers,
    open_plan,
    stream_sizes,
)
from muomni.training.loop import Loop, LoopParts
from muomni.training.moe import find_moe
from muomni.training.optim.groups import groups_digest
from muomni.training.planning.setup import (
    count_parameters,
    describe_data,
    describe_global_batch,
    describe_length,
    describe_model,
    plural,
)
from muomni.training.stage import Stage, StageContext

if TYPE_CHECKING:
    from muomni.training.engine.engine import Engine

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Request:
    """The request of a command line."""

    config: RunConfig
    run: Path
    upstream: Path
    engine_json: dict[str, Any]
    resume: str = "auto"
    allow_mix_change: bool = False  # else a resume with another mix is refused
    # Plan for GPUs that this machine may lack, so do not check its hardware.
    is_for_other_gpus: bool = False
    quiet: bool = False  # print the final result only
    startup: Startup = field(default_factory=Startup)


@dataclass(slots=True)
class Session:
    """A validated request with its stage and data, before a process group exists."""

    request: Request
    ranks: Ranks
    device: torch.device
    precision: str
    stage: Stage
    feed: Feed
    val: Source | None

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the complete run."""
        training = self.request.config.training
        if training.max_steps is not None:
            return training.max_steps
        return self.feed.num_steps(training.max_epochs or 0)

    @property
    def planned(self) -> PlannedFeed:
        """The feed of a run that does not stream; raises ConfigError for one that does."""
        if not isinstance(self.feed, PlannedFeed):
            raise ConfigError("this needs sharded data with an index; remove data.stream")
        return self.feed


def prepare(request: Request, ranks: Ranks) -> Session:
    """Run all checks that need no process group, and open the data; raises MuomniError."""
    config = request.config
    folder = RunFolder(request.run, config.stage)
    request = replace(request, resume=folder.resume_now(request.resume))
    spec = stage_spec(config.stage)
    stage_type = load(spec.stage)
    device = pick_device(ranks.local_rank)
    precision = pick_precision(config.precision, device)
    here = None if request.is_for_other_gpus else device
    candidate = preflight.Candidate(config, request.engine_json, ranks.world_size, here, precision)
    preflight.check(candidate)
    # Only one rank checks hashes and file sizes, to spare the file system.
    upstream = stage_type.find_upstream(config, request.upstream, with_hashes=ranks.is_main)
    stream = config.data.stream
    needs_datasets = stream is None or stream.has_val
    datasets = open_datasets(config.data, spec.tasks) if needs_datasets else []
    tokenizer = open_tokenizer(config.data)
    _check_tokenizers(tokenizer, upstream, config.data.root)
    _check_resume(request.resume)
    # Builds no model yet, since ranks have not seeded their generators.
    stage = stage_type(config, StageContext(tokenizer, upstream, device))
    preflight.check(replace(candidate, stage=stage))
    stage.context.uses_varlen = attention.use_varlen(
        config.training.attention, here, precision, stage.model_config()
    )
    engine_json = expert_parallel.complete_section(
        request.engine_json, find_moe(stage.model_config()), ranks.world_size
    )
    request = replace(request, engine_json=engine_json)
    has_val = any("val" in dataset.splits for dataset in datasets)
    val = Source(datasets, "val", check_files=ranks.is_main) if has_val else None
    reading = Reading(config, stage.view(), ranks, device)
    if stream is not None:
        feed: Feed = _open_stream(reading, stage, stream)
    else:
        train = Source(datasets, "train", check_files=ranks.is_main)
        newest = _newest_to_resume(folder, request.resume)
        feed = open_plan(reading, tokenizer.digest, train, newest, request.allow_mix_change)
    return Session(request, ranks, device, precision, stage, feed, val)


def _open_stream(reading: Reading, stage: Stage, stream: StreamSection) -> StreamFeed:
    """Open tars without index, whose order of samples is approximate."""
    shards = stream_shards(stream.shards, stream.samples_per_shard)
    if reading.ranks.is_main:
        check_local(shards)
    sizes = stream_sizes(stream, batching_of(reading.config.batch), stage.name)
    digest = digest_of(
        STREAM_VERSION, fingerprint(shards), *sizes, stage.tokenizer.digest, reading.config.seed
    )
    return StreamFeed(reading, digest, shards, *sizes)


def open_loop(session: Session) -> Loop:
    """Build model and engine, resume from a checkpoint if there is one, and return the loop.

    Every rank must call it, within a process group.
    """
    from muomni.training.engine.engine import Engine
    from muomni.training.engine.sharded_build import RecordedBuild

    request, config = session.request, session.request.config
    startup, prints = request.startup, collectives.rank() == 0 and not request.quiet
    folder = RunFolder(request.run, config.stage)
    startup.begin("plan")
    if collectives.rank() == 0:
        folder.create()
        folder.remove_leftovers()
        if request.resume != "auto":
            source = None if request.resume == "never" else Path(request.resume)
            aside = folder.start_over(job_name(), source)
            if aside and prints:
                print(row("earlier state", f"moved to {aside}"), flush=True)
    collectives.barrier()
    if config.training.max_epochs is not None:  # needed for the number of steps
        session.feed.count_epochs(config.training.max_epochs)
    # The first global batch is described below by rank 0 alone, which must not count windows by itself.
    session.feed.count_ahead(0, session.num_steps)
    startup.begin("model")
    seed_everything(config.seed)
    use_tf32(config.tf32, session.precision, session.device)
    attention.avoid_cudnn(session.device, session.stage.model_config())
    build = RecordedBuild() if _shards_weights(request.engine_json) else None
    with build or nullcontext(), warnings.catch_warnings():
        # Loading an export into such weights is recorded, too.
        warnings.filterwarnings("ignore", ".*copying from a non-meta parameter.*", UserWarning)
        task = session.stage.build()
    session.stage.set_up(task)
    num_parameters = count_parameters(task)  # before ZeRO shards it
    num_trained = count_parameters(task, only_trained=True)
    model_rows = describe_model(session, task) if prints else []
    trained_groups = groups_digest(task, config.optim)
    startup.begin("engine")
    engine = Engine(
        task,
        config,
        request.engine_json,
        session.precision,
        session.feed.accumulates,
        session.device,
        build,
    )
    is_compiled = compiler.should_compile(
        config.training.compile, os.environ, session.device.type, engine.zero_stage
    )
    if is_compiled:
        compile_blocks(engine.task)
    topology = Topology(
        session.ranks.world_size, engine.zero_stage, session.precision, engine.num_expert_ranks,
        engine.optimizer_layout, trained_groups,
    )  # fmt: skip
    startup.begin("resume")
    with engine.own_settings():
        checkpoint, state = _load_state(session, engine, topology)
    hosts = collectives.gather_objects(socket.gethostname())
    resolved = {
        "upstream": portable(request.upstream, request.run),  # relative to the run folder
        "upstream_digests": _digests(session),
        "ranks": session.ranks.world_size,
        "nodes": len(set(hosts)),
        "device": session.device.type,
        "precision": session.precision,
        "zero_stage": engine.zero_stage,
        "attention": "varlen" if session.stage.context.uses_varlen else "mask",
        "compile": is_compiled,
        "num_workers": num_workers(config.data, session.device),
        "num_steps": session.num_steps,
        "global_batch": config.batch.describe(),
        "num_parameters": num_parameters,
        "num_trained_parameters": num_trained,
        "data_digest": sha256_bytes(session.feed.fingerprint.encode()),
        "tokenizer_digest": session.stage.tokenizer.digest,
        "mix": session.feed.mix,
        "datasets": dataset_facts(session.feed, session.val),
        "deepspeed": engine.settings,
        **provenance(),
    }
    if collectives.rank() == 0:
        folder.write_config(config.model_dump(mode="json"), resolved)
    startup.begin("compile and first step" if is_compiled else "first step")
    if prints:
        start = f"resumed from {checkpoint}" if checkpoint else "from the start"
        steps = f"{state.step}/{session.num_steps} steps"
        engine_facts = [
            describe_precision(config, session.precision, session.device),
            f"ZeRO {engine.zero_stage}",
            f"{plural(session.ranks.world_size, 'rank')} on {plural(resolved['nodes'], 'node')}",
            *(["varlen attention"] if session.stage.context.uses_varlen else []),
            *(["compiled blocks"] if is_compiled else []),
        ]
        source = session.feed.source if isinstance(session.feed, PlannedFeed) else None
        data = describe_data(source, session.feed.num_samples, session.val)
        print(
            f"{styled(config.stage, 'bold')} {start}: {steps}",
            row("batch", describe_global_batch(session)),
            row("epochs", describe_length(session)),
            row("data", data),
            *model_rows,
            row("engine", ", ".join(engine_facts)),
            row("recorders", ", ".join(["metrics.jsonl", *config.training.recorders])),
            sep="\n",
            flush=True,
        )
    parts = LoopParts(
        session.stage, engine, session.feed, session.val, folder, session.device, session.num_steps,
        topology, resolved, request.resume, request.quiet, request.startup,
    )  # fmt: skip
    is_main = collectives.rank() == 0
    recorders = build_recorders(config.training.recorders, request.quiet) if is_main else []
    return Loop(parts, state, recorders)


def finished_result(session: Session) -> dict[str, Any] | None:
    """Return the result if the run is already finished, else None.

    Raises CheckpointError if the run used other data, upstream exports, or model settings.
    """
    folder = RunFolder(session.request.run, session.request.config.stage)
    if session.request.resume != "auto":
        return None
    newest = file_list.newest_complete(folder.checkpoints)
    if newest is None:
        if file_list.candidates(folder.checkpoints):
            raise file_list.none_complete(folder.checkpoints)
        return None
    content = file_list.verify(newest, with_hashes=False)
    state = TrainState.of(content)
    _check_plan(state, session, newest)
    _check_steps(state.step, session, newest)
    _check_upstream(folder, session)
    if newest.name != file_list.step_folder(Path(), session.num_steps).name:
        return None
    if not folder.export.is_dir():
        return None
    export = read_export(folder.export, session.request.config.stage)
    _check_model(export, session)
    if session.ranks.is_main:
        print(
            f"{export.stage} in {folder.root} is finished ({session.num_steps} steps); to continue, increase "
            f"--max-steps; to start over, use --resume never or another --run",
            flush=True,
        )
    return {
        "stage": export.stage, "step": session.num_steps, **export.metrics, "export": str(export.path)
    }  # fmt: skip


def _shards_weights(engine_json: dict[str, Any]) -> bool:
    """Whether no rank holds all weights; AutoEP replaces the experts of a complete model."""
    return zero_stage(engine_json) == 3 and not expert_parallel.is_enabled(engine_json)


def seed_everything(seed: int) -> None:
    """Seed all generators; with the same seed on all ranks, they build the same weights."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def _check_tokenizers(tokenizer: Tokenizer, upstream: dict[str, Export], root: str) -> None:
    for stage, export in upstream.items():
        if export.tokenizer_digest != tokenizer.digest:
            raise UpstreamError(
                f"the tokenizer of {root} is not the one that {export.path} was trained with; "
                f"use data.tokenizer={export.tokenizer_file}, or retrain stage {stage} on this data"
            )


def _load_state(
    session: Session, engine: "Engine", topology: Topology
) -> tuple[Path | None, TrainState]:
    """Load the checkpoint to resume from, if any, into the engine; returns it and the state of the loop."""
    resume, shapes = session.request.resume, engine.shapes_digest()
    fresh = None, TrainState(0, session.feed.digest, None, 0.0, mix=session.feed.mix)
    if resume == "never":
        return fresh
    if resume == "auto":
        root = RunFolder(session.request.run, session.stage.name).checkpoints
        found = store.load_newest(engine.deepspeed, root, topology, shapes)
        if found is None:
            return fresh
        checkpoint, state = found
    else:
        checkpoint = Path(resume)
        state = store.load(engine.deepspeed, checkpoint, topology, shapes)
    if engine.masters.average is not None:
        average = store.load_average(checkpoint, topology, session.device)
        if average is None:
            logger.warning(
                "checkpoint %s has no EMA of the weights; the EMA starts from its weights",
                checkpoint,
            )
        engine.masters.set_average(average)
    _check_plan(state, session, checkpoint)
    _check_steps(state.step, session, checkpoint)
    return checkpoint, replace(state, plan_digest=session.feed.digest, mix=session.feed.mix)


def _check_steps(step: int, session: Session, checkpoint: Path) -> None:
    if step > session.num_steps:
        raise CheckpointError(
            f"checkpoint {checkpoint} is of step {step}, but this run has only {session.num_steps} steps; "
            "increase --max-steps, or resume an earlier checkpoint with --resume PATH"
        )


def _newest_to_resume(folder: RunFolder, resume: str) -> Path | None:
    """The checkpoint to resume from, if its files prove complete."""
    if resume in ("auto", "never"):
        return file_list.newest_complete(folder.checkpoints) if resume == "auto" else None
    return Path(resume)


def _check_resume(resume: str) -> None:
    if resume in ("auto", "never"):
        return
    if not Path(resume).is_dir():
        raise CheckpointError(
            f"--resume {resume} is not a checkpoint folder; use auto, never, or a checkpoint folder"
        )
    file_list.verify(Path(resume), with_hashes=False)


def _check_plan(state: TrainState, session: Session, checkpoint: Path) -> None:
    if state.plan_digest != session.feed.resumed_digest:
        raise CheckpointError(
            f"checkpoint {checkpoint} was written with other data, mix, tokenizer, batch sizes, or seed, "
            f"or by a version with another sample order; restore them, or start over with --resume never"
        )


def _digests(session: Session) -> dict[str, str]:
    """Digests of the upstream exports that this run loads."""
    return {name: export.digest for name, export in session.stage.context.upstream.items()}


def _check_upstream(folder: RunFolder, session: Session) -> None:
    started_with = folder.resolved().get("upstream_digests", {})
    for stage, digest in _digests(session).items():
        if started_with.get(stage, digest) != digest:
            raise CheckpointError(
                f"stage {stage} was retrained after {folder.root} started; start over with --resume never, or "
                f"restore the earlier export of {stage}"
            )


def _check_model(export: Export, session: Session) -> None:
    wanted = session.stage.model_config()
    has, wants = flatten(export.config(type(wanted)).model_dump()), flatten(wanted.model_dump())
    changed = sorted(key for key in has.keys() | wants.keys() if has.get(key) != wants.get(key))
    if changed:
        settings = ", ".join(f"{key}={has.get(key)} (not {wants.get(key)})" for key in changed)
        raise CheckpointError(
            f"{export.path} was finished with {settings}; restore model.*, or start over with --resume never "
            f"or another --run"
        )
