"""`muomni convert`: write an export in the format of transformers or open_clip."""

import argparse

from muomni.command_line import path

SUMMARY = """\
Convert the export of stage thinker to transformers' Qwen3, or of vision_encoder to open_clip's CLIP."""
EXAMPLES = (
    "muomni convert --run runs/first --stage thinker --out thinker-qwen3",
    "muomni convert --run runs/first --stage vision_encoder --out clip",
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add source and target."""
    parser.add_argument("--run", type=path, required=True, help="run folder with the export")
    parser.add_argument("--stage", required=True, help="thinker or vision_encoder")
    parser.add_argument("--out", type=path, required=True, help="folder to create")


def run(arguments: argparse.Namespace) -> None:
    """Write the converted export; raises MuomniError."""
    from muomni.checkpoint.convert import write_converted
    from muomni.checkpoint.export import read_export
    from muomni.config.registry import stage_spec
    from muomni.run_folder import RunFolder

    stage = stage_spec(arguments.stage).name
    export = read_export(RunFolder(arguments.run, stage).export, stage)
    name = write_converted(export, arguments.out)
    print(f"{arguments.out}: {name}, from {export.path}")
