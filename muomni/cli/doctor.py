"""`muomni doctor`: check machine, packages, data, and configs, with one line per check.

The exit code is 0 if all checks pass, else that of the first failed check.
"""

import argparse
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from muomni.command_line import path
from muomni.config.names import preset_names
from muomni.distributed.compiler import (
    add_interpreter_folder,
    extensions_folder,
    missing_for_compiling,
    missing_for_extensions,
)
from muomni.distributed.devices import check_gpus_usable
from muomni.distributed.launcher import num_cores
from muomni.errors import DataError, MachineError, MuomniError

SUMMARY = "Check whether this machine, its packages, data, and exports are ready for training."
EXAMPLES = ("muomni doctor", "muomni doctor --data data/mine --run runs/mine")
MIN_PYTHON = (3, 10)
MIN_FREE_BYTES = 5 * 10**9  # a few checkpoints of a small model
MIN_SHARED_BYTES = 10**9  # decoded batches of worker processes
PACKAGES = (
    "torchaudio", "torchvision", "webdataset", "sentencepiece", "mlflow", "soundfile", "pydantic",
    "safetensors", "PIL", "simplejpeg", "jiwer", "psutil", "yaml",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Check:
    """A name, and a function that returns its finding or raises MuomniError."""

    name: str
    look: Callable[[], str]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add options for data, run, and preset."""
    parser.add_argument("--data", type=path, help="also check the datasets in this folder")
    parser.add_argument("--run", type=path, help="also check this run folder and its exports")
    parser.add_argument(
        "--preset",
        default="nano",
        help=f"preset whose configs to resolve: {', '.join(preset_names())} (default: nano)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print one line per check and exit with the code of the first that fails."""
    add_interpreter_folder(os.environ)
    first_code = 0
    for check in checks(arguments):
        try:
            print(f"ok      {check.name}: {check.look()}", flush=True)
        except MuomniError as error:
            print(f"failed  {check.name}: {error}", flush=True)
            first_code = first_code or error.exit_code
    raise SystemExit(first_code)


def checks(arguments: argparse.Namespace) -> Iterator[Check]:
    """Yield all checks; later ones rely on earlier ones."""
    yield Check("python", check_python)
    yield Check("torch", check_torch)
    yield Check("deepspeed", check_deepspeed)
    yield Check("packages", check_packages)
    yield Check("devices", check_devices)
    yield Check("compiler", check_compiler)
    yield Check("shared-memory op", check_shared_memory_op)
    yield Check("host name", check_host_name)
    yield Check("shared memory", check_shared_memory)
    yield Check("disk", lambda: check_disk(arguments.run or Path("runs")))
    yield Check(f"preset {arguments.preset}", lambda: check_preset(arguments.preset))
    if arguments.data is not None:
        yield from data_checks(arguments.data)
    if arguments.run is not None:
        yield from run_checks(arguments.run, arguments.data)


def check_python() -> str:
    found = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < MIN_PYTHON:
        raise MachineError(f"this is Python {found}; install 3.10 or newer and run make install")
    return f"{found}, {sys.prefix}"


def check_torch() -> str:
    import_or_fail("torch")
    import torch

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
    return f"{torch.__version__}, built for {built_for}"


def check_deepspeed() -> str:
    import torch

    sets_cpu = not torch.cuda.is_available() and "DS_ACCELERATOR" not in os.environ
    if sets_cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"  # else it warns that it found no GPU
    found = metadata.version("deepspeed") if import_or_fail("deepspeed") else ""
    if sets_cpu:
        del os.environ[
            "DS_ACCELERATOR"
        ]  # `check_devices` must know that the user did not choose the CPU
    if not (Path(sys.executable).parent / "deepspeed").is_file():
        raise MachineError(
            f"the deepspeed command is not in the folder of {sys.executable}; run make install"
        )
    return found


def check_packages() -> str:
    for name in PACKAGES:
        import_or_fail(name)
    return f"{len(PACKAGES)} packages can be imported"


def import_or_fail(name: str) -> bool:
    """Import a package; raises MachineError with the reason if that fails."""
    try:
        __import__(name)
    except Exception as error:  # broken binary packages raise any type
        reason = " ".join(str(error).split())[:200]
        raise MachineError(f"{name} cannot be imported ({reason}); run make install") from None
    return True


def check_devices() -> str:
    import torch

    if not torch.cuda.is_available():
        check_gpus_usable(os.environ)
        return f"no GPU; ranks run on {num_cores()} CPU cores"
    names = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        names.append(f"{properties.name} {properties.total_memory / 1e9:.0f} GB")
    torch.zeros(1, device="cuda").add_(1).item()  # fails if the driver is too old
    bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
    return f"{', '.join(names)}; {bf16}"


def check_compiler() -> str:
    missing = missing_for_compiling(os.environ)
    if missing is not None:
        raise MachineError(f"DeepSpeed's ops cannot be compiled here; install {missing}")
    return shutil.which(os.environ.get("CXX", "c++")) or ""


def check_shared_memory_op() -> str:
    """On CPUs, DeepSpeed compiles the op at the first start of ranks, in about a minute."""
    import torch

    if torch.cuda.is_available():
        return "not needed with GPUs"
    missing = missing_for_extensions(os.environ)
    if missing is not None:
        raise MachineError(f"ranks would use gloo, which is slower; the op needs {missing}")
    built = sorted(extensions_folder(os.environ).glob("**/deepspeed_shm_comm.so"))
    python = f"py{sys.version_info[0]}{sys.version_info[1]}_"
    own = [file for file in built if python in str(file) or "TORCH_EXTENSIONS_DIR" in os.environ]
    return str(own[0]) if own else "not compiled yet; the first start of several ranks compiles it"


def check_host_name() -> str:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        raise MachineError(
            f"'{name}' has no address, which ranks need to connect; add it to /etc/hosts"
        ) from None
    return f"{name} is {address}"


def check_shared_memory() -> str:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        raise MachineError("/dev/shm is missing; mount it, or set data.num_workers=0")
    size = shutil.disk_usage(folder).total
    if size < MIN_SHARED_BYTES:
        raise MachineError(
            f"/dev/shm has {size / 1e6:.0f} MB, too little for worker processes; start the container "
            f"with --shm-size=8g, or set data.num_workers=0"
        )
    return f"/dev/shm has {size / 1e9:.1f} GB"


def check_disk(run: Path) -> str:
    existing = next(p for p in (run.resolve(), *run.resolve().parents) if p.exists())
    if not os.access(existing, os.W_OK):
        raise MachineError(f"{existing} is not writable; choose another --run")
    free = shutil.disk_usage(existing).free
    if free < MIN_FREE_BYTES:
        raise MachineError(
            f"{existing} has {free / 1e9:.1f} GB free, but checkpoints need {MIN_FREE_BYTES / 1e9:.0f} GB; "
            f"free some space, or choose another --run"
        )
    return f"{free / 1e9:.0f} GB free at {existing}"


def check_preset(preset: str) -> str:
    from muomni.config.loading import resolve
    from muomni.config.registry import STAGES

    for stage in STAGES:
        resolve(stage, preset)
    return f"configs of {len(STAGES)} stages resolve"


def data_checks(data: Path) -> Iterator[Check]:
    """Yield one check per dataset in `data`, and one for the tokenizer."""
    from muomni.data.text.tokenizer import Tokenizer

    folders = [folder for folder in (data, *sorted(data.glob("*"))) if folder.is_dir()]
    datasets = [folder for folder in folders if (folder / "manifest.json").is_file()]
    if not datasets:

        def nothing() -> str:
            raise DataError(
                f"{data} contains no dataset; create one with python -m data_prep, or choose another --data"
            )

        yield Check("data", nothing)
        return
    for folder in datasets:
        yield Check(f"data {folder}", lambda folder=folder: check_dataset(folder))
    yield Check(
        "tokenizer",
        lambda: f"{Tokenizer.load(data / 'tokenizer.model').vocab_size} pieces",
    )


def check_dataset(folder: Path) -> str:
    """Compare sizes and counts of all shards with the manifest; raises DataError."""
    from data_prep.inspection.verify import verify
    from muomni.data.shards.manifest import Manifest

    manifest = Manifest.load(folder)
    report = verify(manifest, full=False, decode_percent=0.0, num_workers=1)
    if report.problems:
        raise DataError(f"{len(report.problems)} problems, the first: {report.problems[0]}")
    splits = ", ".join(f"{name} {split.num_samples:,}" for name, split in manifest.splits.items())
    return f"{manifest.task}, {splits}"


def run_checks(run: Path, data: Path | None) -> Iterator[Check]:
    """Yield one check per export in `run`."""
    from muomni.config.registry import STAGES

    for stage in STAGES:
        if (run / stage / "export").is_dir():
            yield Check(f"export {stage}", lambda stage=stage: check_export(run, stage, data))


def check_export(run: Path, stage: str, data: Path | None) -> str:
    """Check the hashes of an export, and that its tokenizer is that of `data`; raises MuomniError."""
    from muomni.checkpoint.export import read_export
    from muomni.data.text.tokenizer import Tokenizer

    export = read_export(run / stage / "export", stage)
    if data is not None and (data / "tokenizer.model").is_file():
        tokenizer = Tokenizer.load(data / "tokenizer.model")
        if tokenizer.digest != export.tokenizer_digest:
            raise DataError(
                f"its tokenizer differs from {data / 'tokenizer.model'}; set "
                f"data.tokenizer={export.tokenizer_file}, or retrain {stage} on this data"
            )
    return f"step {export.content['step']}, preset {export.content['preset']}"
