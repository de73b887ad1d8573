"""Import rules between packages, checked on syntax trees.

Imports inside functions count, too. Each rule is also tested on a tree that violates it.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# A package may import itself and packages of lower layers, but not others of its own layer.
LAYERS = {
    "errors": 0,
    "config": 0,
    "io": 0,
    "command_line": 0,
    "distributed": 1,
    "models": 1,
    "data": 1,
    "run_folder": 2,
    "run_lock": 2,
    "observe": 2,
    "checkpoint": 3,
    "training": 4,
    "inference": 5,
    "evaluation": 6,  # scores answers of inference
    "chat": 6,
    "pipeline": 7,
    "cli": 8,
}
OPEN_LAYERS = {0}  # whose packages may import each other
MODELS_MAY_IMPORT = {"torch", "torchaudio", "muomni"} | set(sys.stdlib_module_names)
MODELS_MAY_IMPORT_FROM_MUOMNI = {"muomni.errors", "muomni.config", "muomni.models"}
DATA_PREP_MAY_NOT_IMPORT = ("deepspeed", "muomni.models", "muomni.training", "muomni.checkpoint")
MAY_IMPORT_DEEPSPEED = (
    "muomni/distributed/deepspeed_import.py",
    "muomni/training/engine/",
    "muomni/checkpoint/",
)
QUIRKS = "muomni/training/engine/deepspeed_quirks.py"
# Private or undocumented names of DeepSpeed; its parameters' `ds_*` count as well.
PRIVATE_DEEPSPEED_NAMES = {
    "__compatible_ops__", "_is_autoep_layer", "_partition_all_parameters",
    "_reassign_or_swap_out_partitioned_parameters", "allreduce_gradients", "buffered_allreduce_fallback",
    "cur_scale", "ep_group", "fp16_groups", "fp32_groups", "fp32_groups_flat_partition",
    "fp32_partitioned_groups_flat", "is_fp16_supported", "loss_scaler", "persistent_parameters",
    "raise_error_at_min_scale", "refresh_fp32_params", "set_gradient_accumulation_boundary",
    "single_partition_of_fp32_groups", "update_lp_params",
}  # fmt: skip
DS_ATTRIBUTE = re.compile(r"ds_(?:numel|shape|tensor|persist|zero_partition_rank|id|status)")
SHARED_BY_STAGES = {"frozen_codec"}

Import = tuple[str, str]  # file relative to the root, full name that it imports


def imports_below(root: Path, folder: str) -> Iterator[Import]:
    """Yield all imports of Python files below `root/folder`; relative imports are resolved."""
    for path in sorted((root / folder).rglob("*.py")):
        name = path.relative_to(root).as_posix()
        package = list(path.relative_to(root).parent.parts)
        for node in ast.walk(ast.parse(path.read_text(), filename=name)):
            if isinstance(node, ast.Import):
                yield from ((name, alias.name) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = package[: len(package) + 1 - node.level] if node.level else []
                module = ".".join(base + (node.module.split(".") if node.module else []))
                # `from muomni import data` imports the package `muomni.data`.
                yield from ((name, f"{module}.{alias.name}") for alias in node.names)


def is_in(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def package_of(file: str) -> str:
    return file.split("/")[1].removesuffix(".py")


def upward_imports(root: Path) -> list[Import]:
    """Imports inside muomni that do not point to a lower layer, and packages without a layer."""
    wrong = []
    for file, module in imports_below(root, "muomni"):
        if not is_in(module, "muomni") or package_of(file) == "__init__":
            continue
        source, target = package_of(file), module.split(".")[1]
        if target == "__version__":
            continue
        high, low = LAYERS.get(source), LAYERS.get(target)
        is_open = high == low and high in OPEN_LAYERS
        if high is None or low is None or (source != target and low >= high and not is_open):
            wrong.append((file, module))
    return wrong


def impure_models(root: Path) -> list[Import]:
    """Imports of muomni/models other than tensor libraries."""
    return [
        (file, module)
        for file, module in imports_below(root, "muomni/models")
        if module.split(".")[0] not in MODELS_MAY_IMPORT
        or is_in(module, "torch.distributed")
        or (is_in(module, "muomni") and not is_in(module, *MODELS_MAY_IMPORT_FROM_MUOMNI))
    ]


def stray_deepspeed(root: Path) -> list[Import]:
    """Imports of deepspeed outside the modules that may, including launch/."""
    return [
        (file, module)
        for folder in ("muomni", "data_prep", "launch")
        for file, module in imports_below(root, folder)
        if is_in(module, "deepspeed") and not file.startswith(MAY_IMPORT_DEEPSPEED)
    ]


def private_deepspeed_names(root: Path) -> list[Import]:
    """Private names of DeepSpeed as attributes or strings (`getattr`) outside of deepspeed_quirks.py."""
    found = []
    for path in sorted((root / "muomni").rglob("*.py")):
        file = path.relative_to(root).as_posix()
        for node in ast.walk(ast.parse(path.read_text(), filename=file)):
            name = None
            if isinstance(node, ast.Attribute):
                name = node.attr
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                name = node.value
            is_private = name in PRIVATE_DEEPSPEED_NAMES or DS_ATTRIBUTE.fullmatch(name or "")
            if name and is_private and file != QUIRKS:
                found.append((file, name))
    return found


def imports_between_stages(root: Path) -> list[Import]:
    """A stage is a file or folder of muomni/training/stages."""
    stages = "muomni/training/stages"
    names = {path.stem for path in (root / stages).iterdir()} - {"__init__", "__pycache__"}
    names -= SHARED_BY_STAGES
    wrong = []
    for file, module in imports_below(root, stages):
        own = Path(file).relative_to(stages).parts[0].removesuffix(".py")
        others = (f"muomni.training.stages.{name}" for name in names - {own})
        if own in names and is_in(module, *others):
            wrong.append((file, module))
    return wrong


def heavy_data_prep(root: Path) -> list[Import]:
    return [
        (file, module)
        for file, module in imports_below(root, "data_prep")
        if is_in(module, *DATA_PREP_MAY_NOT_IMPORT)
    ]


RULES: list[tuple[Callable[[Path], list[Import]], str, str]] = [
    (upward_imports, "muomni/models/layers/layers.py", "from muomni.training import loop"),
    (upward_imports, "muomni/data/sampling/plan.py", "import muomni.models.layers.attention"),
    (upward_imports, "muomni/data/sampling/plan.py", "from ... import distributed"),
    (upward_imports, "muomni/checkpoint/store.py", "def f():\n    from muomni import training"),
    (upward_imports, "muomni/new_package/module.py", "import muomni.errors"),
    (impure_models, "muomni/models/speech/codec.py", "import torch.distributed as dist"),
    (impure_models, "muomni/models/speech/codec.py", "from torch import distributed"),
    (impure_models, "muomni/models/speech/codec.py", "import soundfile"),
    (impure_models, "muomni/models/speech/codec.py", "from muomni.data import plan"),
    (stray_deepspeed, "muomni/training/loop.py", "import deepspeed"),
    (stray_deepspeed, "launch/train.py", "from deepspeed import comm"),
    (private_deepspeed_names, "muomni/training/loop.py", "engine.optimizer.update_lp_params()"),
    (private_deepspeed_names, "muomni/checkpoint/store.py", "getattr(x, '_is_autoep_layer', 0)"),
    (private_deepspeed_names, "muomni/training/session.py", "sum(p.ds_numel for p in parameters)"),
    (imports_between_stages, "muomni/training/stages/sft/stage.py", "from .. import thinker"),
    (heavy_data_prep, "data_prep/sharding/sharder.py", "from muomni.models import mel"),
]


@pytest.mark.parametrize(
    "rule", list(dict.fromkeys(rule for rule, _, _ in RULES)), ids=lambda rule: rule.__name__
)
def test_rule_holds(rule: Callable[[Path], list[Import]]) -> None:
    assert rule(ROOT) == []


@pytest.mark.parametrize(("rule", "file", "line"), RULES)
def test_rule_detects_a_violation(
    rule: Callable[[Path], list[Import]], file: str, line: str, tmp_path: Path
) -> None:
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_text(f"{line}\n")
    (tmp_path / "muomni/training/stages").mkdir(parents=True, exist_ok=True)
    (tmp_path / "muomni/training/stages/thinker.py").touch()
    assert [found for found, _ in rule(tmp_path)] == [file]


@pytest.mark.parametrize("module", ["muomni", "muomni.errors", "muomni.config.models", "data_prep"])
def test_light_imports_stay_light(module: str) -> None:
    heavy = ["torch", "deepspeed", "mlflow", "transformers"]
    probe = f"import sys, {module}; print([name for name in {heavy} if name in sys.modules])"
    outcome = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True
    )
    assert (outcome.returncode, outcome.stdout.strip()) == (0, "[]"), outcome.stderr
