"""`muomni demo`: a conversation in the browser with the export of stage sft."""

import argparse
import socket
from importlib.util import find_spec

from muomni.cli.generate import add_chat_options, chat_options
from muomni.command_line import integer
from muomni.errors import ConfigError, MachineError
from muomni.io.console import protect_output

SUMMARY = """\
Talk to a trained model in the browser: text, images, microphone, and spoken answers.

The page is served on this machine only, unless --host says otherwise, and loads nothing from the internet.
Needs pip install 'muomni[demo]'."""
EXAMPLES = (
    "muomni demo --run runs/first",
    "muomni demo --run runs/first --host 0.0.0.0 --port 8000",
)
_LOOPBACK = "127.0.0.1"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the address, the run, the limits of answers, and sampling."""
    parser.add_argument(
        "--host", default=_LOOPBACK,
        help="address to listen on; 0.0.0.0 lets other machines in, without a password",
    )  # fmt: skip
    parser.add_argument("--port", type=integer(1, 65535), default=7860, help="port to listen on")
    add_chat_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C; raises MuomniError."""
    if find_spec("gradio") is None:
        raise MachineError("the package gradio is missing; run pip install 'muomni[demo]'")
    _check_address(arguments.host, arguments.port)
    protect_output(None)
    print(f"loading {arguments.run} ...", flush=True)
    from muomni.chat.web import serve
    from muomni.inference.load import open_assistant

    assistant = open_assistant(arguments.run, not arguments.no_tf32)
    serve(assistant, chat_options(arguments), arguments.host, arguments.port)


def _check_address(host: str, port: int) -> None:
    """Raise ConfigError if the server could not listen here."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"cannot listen on {host}:{port} ({reason}); choose another --port or --host"
        ) from None
