"""`muomni demo` in headless Chromium: questions, uploads, microphone, and no request beyond the machine."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ROOT / "build" / "demo"  # where `make test-slow` installs gradio and playwright
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Logs every address that the server connects to or resolves.
AUDITED = """if True:
    import sys
    log = open(sys.argv.pop(1), "a", buffering=1)
    def audit(event, arguments):
        if event == "socket.connect" and isinstance(arguments[1], tuple):
            print(arguments[1][0], file=log)
        elif event == "socket.getaddrinfo":
            print(arguments[0], file=log)
    sys.addaudithook(audit)
    from muomni.cli.main import main
    main(sys.argv[1:])
"""
TIMEOUT_S = 120

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium"),
]


class Server:
    """A running demo."""

    def __init__(self, run: Path, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/"
        self.log, self.addresses, self.temporary = (
            folder / name for name in ("demo.log", "addresses", "temporary")
        )
        self.temporary.mkdir()
        environment = {name: text for name, text in os.environ.items() if name != "HOME"}
        environment |= {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{PACKAGES}",
            "TMPDIR": str(self.temporary),
            "HTTP_PROXY": "http://127.0.0.1:9",  # where nobody listens
        }
        command = [sys.executable, "-c", AUDITED, str(self.addresses), "demo", "--run", str(run)]
        command += ["--port", str(port), "--max-new-tokens", "16", "--max-seconds", "1"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        end = time.monotonic() + TIMEOUT_S
        while self.url not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.2)


class Browser:
    """A page of the demo; `requests` and `problems` are filled by the browser."""

    def __init__(self, page: Any, url: str) -> None:
        self.page = page
        self.requests: list[str] = []
        self.problems: list[str] = []
        page.set_default_timeout(TIMEOUT_S * 1000)
        page.on("request", lambda request: self.requests.append(request.url))
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#question textarea")

    def ask(self, text: str, *files: Path) -> str:
        """Send a question and return the answer, or the line that says why there is none."""
        num_before = len(self.answers())
        if files:
            self.page.set_input_files("#question input[type=file]", list(map(str, files)))
            self.page.wait_for_function(
                f"document.querySelectorAll('#question .thumbnail-item').length == {len(files)}"
            )
        self.page.fill("#question textarea", text)
        self.page.press("#question textarea", "Enter")
        return self.next_answer(num_before)

    def next_answer(self, num_before: int) -> str:
        """Wait for an answer beyond the first `num_before` ones."""
        selector = "[data-testid=bot] .message-content"
        self.page.wait_for_function(
            f"document.querySelectorAll('{selector}').length > {num_before}"
        )
        return self.answers()[num_before]

    def answers(self) -> list[str]:
        """The texts of the assistant."""
        found = self.page.query_selector_all("[data-testid=bot] .message-content")
        return [element.inner_text() for element in found]


@pytest.fixture(scope="module")
def server(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(run, tmp_path_factory.mktemp("server"))
    yield started
    started.process.kill()
    started.process.wait()


@pytest.fixture()
def browser(server: Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[Browser]:
    monkeypatch.syspath_prepend(str(PACKAGES))
    sys.path.append(sys.path.pop(0))  # only for what the environment lacks
    from playwright.sync_api import sync_playwright  # pyright: ignore[reportMissingImports]

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream",
            ],
        )
        yield Browser(chromium.new_page(permissions=["microphone"]), server.url)
        chromium.close()


def test_questions_are_answered_in_text_and_speech(browser: Browser, files: Path) -> None:
    page = browser.page
    assert browser.ask("the door", files / "red.png") == "red"
    page.wait_for_selector("[data-testid=bot] [data-testid^=waveform]")
    speech = page.get_attribute("a.download-link[href$='.wav']", "href")
    assert page.request.get(speech).body()[:4] == b"RIFF"
    page.uncheck("input[type=checkbox]")
    assert browser.ask("the door", files / "blue.png") == "blue"
    assert len(page.query_selector_all("[data-testid=bot] [data-testid^=waveform]")) == 1
    page.click("text=New conversation")
    page.wait_for_function("document.querySelectorAll('[data-testid=bot]').length == 0")
    assert browser.ask("the door", files / "green.png") == "green"
    assert browser.problems == []


def test_unusable_uploads_are_one_line_each(browser: Browser, files: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("notes")
    for file, message in (
        (files / "broken.png", "(not sent: broken.png: broken image"),
        (files / "empty.wav", "(not sent: empty.wav: audio clip of zero length"),
        (files / "long.wav", "(not sent: long.wav: the audio clip is 600.0 s long, but"),
        (tmp_path / "notes.txt", "(not sent: notes.txt is neither an image nor an audio file"),
    ):
        answer = browser.ask("the door", file)
        assert answer.startswith(message) and "\n" not in answer
        assert browser.page.input_value("#question textarea") == "the door"
    assert browser.ask("the door", files / "white.png") == "white"
    assert browser.problems == []


def test_speech_from_the_microphone_is_answered(browser: Browser) -> None:
    page = browser.page
    page.click("[data-testid=microphone-button]")
    page.click("#question .record-button")
    page.wait_for_timeout(1500)
    page.click("#question .stop-button")
    page.click("[aria-label='Attach audio']")
    page.fill("#question textarea", "the river")
    page.click("[data-testid=submit-button]")
    assert not browser.next_answer(0).startswith("(not sent")
    assert page.query_selector_all("[data-testid=user] [data-testid^=waveform]")


def test_nothing_leaves_the_machine_and_nothing_stays(
    server: Server, browser: Browser, files: Path
) -> None:
    """Runs last: it stops the server."""
    assert browser.ask("the door", files / "red.png") == "red"
    own = (server.url, f"blob:{server.url}", "data:")
    assert [url for url in browser.requests if not url.startswith(own)] == []
    assert set(server.addresses.read_text().split()) <= {"127.0.0.1", "localhost"}
    assert list(server.temporary.iterdir())
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(60)
    assert list(server.temporary.iterdir()) == []
    assert "Traceback" not in server.log.read_text()
