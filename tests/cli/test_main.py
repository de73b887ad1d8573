"""The command `muomni`: help of every verb, mistakes in one sentence, completion."""

import subprocess
import sys
import time

import pytest
import shtab

from muomni.cli.completion import complete_parser
from muomni.cli.main import VERBS, main, verb_module, verb_parser
from muomni.config.models import SPEECH_TEMPERATURE

PARSED = [verb for verb in VERBS if hasattr(verb_module(verb), "add_options")]


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "muomni.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_is_light_and_has_examples(verb: str) -> None:
    code = (
        "import sys; from muomni.cli.main import main\n"
        f"try: main([{verb!r}, '--help'])\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'deepspeed', 'mlflow', 'pydantic'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "heavy: []"
    assert "(default: None)" not in done.stdout
    if verb in PARSED:
        assert "examples:" in done.stdout


def test_help_lists_every_verb_and_is_fast() -> None:
    start = time.process_time()
    done = run("--help")
    assert done.returncode == 0 and time.process_time() - start < 1
    assert all(f"  {verb}" in done.stdout for verb in VERBS)


def test_generate_has_the_default_temperature_of_the_config() -> None:
    parser = verb_parser("generate", verb_module("generate"))
    assert parser.parse_args([]).speech_temperature == SPEECH_TEMPERATURE


def test_version() -> None:
    assert run("--version").stdout.startswith("muomni 0.")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "muomni: unknown verb 'trian' (did you mean 'train'?)"),
        (["train", "--stge", "sft"], "muomni train: unknown option --stge (did you mean '--stage'?)"),
        (["train"], "muomni train: the following arguments are required: --stage"),
        (["train", "--stage", "sft", "--prset", "x"], "unknown option --prset (did you mean '--preset'?)"),
        (["train", "--stage", "sft", "lr=1e-3"], "(did you mean 'optim.lr'?)"),
        (["train", "--stage", "sft", "batch.rows=2"], "was renamed to 'batch.micro_sequences'"),
        (["train", "--stage", "sft", "batch.size=2"], "was renamed to 'batch.seq_len'"),
        (["train", "--stage", "codec", "batch.size=2"], "was renamed to 'batch.micro_samples'"),
        (["pipeline", "--run", "r", "--side-by-side", "2"], "was renamed to --parallel-stages"),  # terms: allow
        (["ckpt", "ls", "nowhere"], "muomni ckpt: nowhere has no checkpoints"),
    ],
)  # fmt: skip
def test_a_user_error_is_one_sentence(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1


def test_a_wrong_key_is_rejected_before_torch_is_imported() -> None:
    code = (
        "import sys; from muomni.cli.main import main\n"
        "try: main(['train', '--stage', 'sft', 'model.projektor=3'])\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False"
    assert done.stderr.startswith("muomni train: unknown key 'model.projektor'")


def test_completion_knows_the_options_of_every_verb() -> None:
    script = shtab.complete(complete_parser(), "bash")
    for verb in PARSED:
        options = [
            text
            for action in verb_parser(verb, verb_module(verb))._actions
            for text in action.option_strings
        ]
        assert verb in script and all(option in script for option in options[:3])
