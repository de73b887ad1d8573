"""The web side of `muomni demo`: a Gradio page for conversations in the browser.

The page loads nothing from the internet, and nothing is sent there: no fonts, analytics, or share link.
"""

import os
import signal
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from muomni.chat.attachments import MAX_FILE_BYTES, media_kind
from muomni.chat.session import ChatOptions, ChatSession
from muomni.errors import ConfigError, MuomniError
from muomni.inference.load import Assistant

_TITLE = "muomni demo"
# Answers are generated one at a time: the model uses the whole device.
_ONE_AT_A_TIME = {"concurrency_id": "model", "concurrency_limit": 1}

# Players would be as tall as images, and "Share" would upload files to the internet.
_CSS = """
.message .minimal-audio-player { height: 2.5rem }
button[title="Share"] { display: none }
"""


@dataclass(slots=True)
class Conversation:
    """What one browser tab shows, and its session: (role, text or file) in order."""

    session: ChatSession
    shown: list[tuple[str, str | Path]] = field(default_factory=list)


def serve(assistant: Assistant, options: ChatOptions, host: str, port: int) -> None:
    """Serve the page until Ctrl-C or SIGTERM; raises ConfigError if the options or the address are invalid."""
    ChatSession(assistant, options)  # refuses options before anyone opens the page
    _reach_without_proxy(host)
    with tempfile.TemporaryDirectory(prefix="muomni_demo_") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # uploads must not outlive the server
        page = build_page(assistant, options, Path(folder))
        from gradio.themes import Default  # pyright: ignore[reportMissingImports]

        try:
            page.launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                ssr_mode=False,
                run_history=False,
                pwa=False,
                mcp_server=False,
                enable_monitoring=False,
                footer_links=[],
                max_file_size=MAX_FILE_BYTES,
                css=_CSS,
                # Names of fonts, instead of objects that load them from the web.
                theme=Default(font=("system-ui", "sans-serif"), font_mono=("monospace",)),
            )
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot serve on {host}:{port} ({error})") from None
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # to delete the folder
        print(f"demo: {page.local_url}  (Ctrl-C stops it)", flush=True)
        page.block_thread()


def build_page(assistant: Assistant, options: ChatOptions, folder: Path) -> Any:
    """The page as `gradio.Blocks`: history, question with files and microphone, spoken answers in `folder`."""
    import gradio  # pyright: ignore[reportMissingImports]

    def messages(conversation: Conversation) -> list[dict[str, Any]]:
        players = {"image": gradio.Image, "audio": gradio.Audio}
        return [
            {
                "role": role,
                "content": content
                if isinstance(content, str)
                else players[media_kind(content)](str(content), buttons=["download"]),
            }
            for role, content in conversation.shown
        ]

    def send(question: dict[str, Any], speaks: bool, conversation: Conversation | None) -> Any:
        conversation = conversation or Conversation(ChatSession(assistant, options, folder))
        text = question["text"].strip()
        is_answered = answer_question(conversation, text, question["files"], speaks)
        return messages(conversation), {"text": "" if is_answered else text}, conversation

    limits = ChatSession(assistant, options).limits
    with gradio.Blocks(title=_TITLE, analytics_enabled=False, fill_height=True) as page:
        conversation = gradio.State(None)
        gradio.Markdown(f"### {_TITLE}: {assistant.path}")
        history = gradio.Chatbot(
            show_label=False,
            scale=1,
            render_markdown=False,  # shows what the model wrote
            feedback_options=None,
            buttons=["copy"],
            placeholder="Ask something, with images or speech if you like.",
        )
        question = gradio.MultimodalTextbox(
            sources=["upload", "microphone"],
            file_count="multiple",
            placeholder=f"Question; images, and audio clips of at most {limits.audio_s:.0f} s",
            show_label=False,
            autofocus=True,
            elem_id="question",
        )
        with gradio.Row():
            speaks = gradio.Checkbox(
                assistant.model.talker is not None,
                label="Speak the answers",
                interactive=assistant.model.talker is not None,
                container=False,
            )
            clear = gradio.Button("New conversation", size="sm", scale=0)
        question.submit(
            send,
            [question, speaks, conversation],
            [history, question, conversation],
            api_visibility="private",
            **_ONE_AT_A_TIME,
        )
        gradio.on(
            [clear.click, history.clear],
            lambda: ([], None),
            None,
            [history, conversation],
            api_visibility="private",
        )
    return page


def answer_question(
    conversation: Conversation, text: str, files: Sequence[str], speaks: bool
) -> bool:
    """Answer a question and add both to what is shown, or one line that says why not.

    Returns whether the question was answered.
    """
    session, shown = conversation.session, conversation.shown
    asked = [("user", Path(file)) for file in files] + [("user", text)] * bool(text)
    try:
        for file in map(Path, files):
            session.attach(media_kind(file), file)
        reply = session.send(text)
    except MuomniError as error:
        session.attachments.clear()
        shown.append(("assistant", f"(not sent: {error})"))
        return False
    shown += [*asked, ("assistant", reply.text or "(no answer)")]
    shown += [("assistant", f"({notice})") for notice in reply.notices]
    if speaks and reply.text.strip():
        try:
            shown.append(("assistant", session.speak().path))
        except MuomniError as error:
            shown.append(("assistant", f"(not spoken: {error})"))
    return True


def _reach_without_proxy(host: str) -> None:
    """Let Gradio, which requests its own page once, reach it on machines with an HTTP proxy."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "localhost", host)))
