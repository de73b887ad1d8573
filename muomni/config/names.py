"""Names of the shipped presets, stages, and DeepSpeed configs, from their file names.

Command-line help uses this, so it must not import pydantic or torch.
"""

from pathlib import Path

CONFIG_ROOT = Path(__file__).resolve().parent
PRESETS = CONFIG_ROOT / "presets"
RECIPES = CONFIG_ROOT / "recipes"
ENGINES = CONFIG_ROOT / "deepspeed"


def preset_names() -> list[str]:
    """Names of the presets in `muomni/config/presets`."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def recipe_names() -> list[str]:
    """Names of the stages that have a recipe in `muomni/config/recipes`."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def engine_names() -> list[str]:
    """Names of the DeepSpeed configs in `configs/deepspeed`."""
    return sorted(path.stem for path in ENGINES.glob("*.json"))
