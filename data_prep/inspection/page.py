"""A web page of samples: images, players, spectrograms, and texts, that a browser opens without a server.

Texts are escaped, since corpora come from the web, and shown in their own direction and with the fonts of the
browser. Audio clips are decoded to WAV, which every browser and editor plays.
"""

import html
import io
from pathlib import Path

import soundfile

from data_prep.inspection.audio_panel import audio_panel
from data_prep.inspection.preview import text_lines
from data_prep.members import Sample, media_of
from muomni.data.media.decode import image_size, read_audio
from muomni.data.media.formats import AUDIO_EXTENSIONS, IMAGE_EXTENSIONS
from muomni.data.shards.manifest import Manifest
from muomni.data.shards.reader import SplitReader
from muomni.errors import DataError
from muomni.io.atomic_write import write_atomic

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: #222 }
article { border-top: 1px solid #ddd; padding: 1em 0 }
h2 { font-size: 1em; font-family: ui-monospace, monospace; margin: 0 0 .5em; overflow-wrap: anywhere }
h2 small { color: #666; font-weight: normal }
p { margin: .5em 0; white-space: pre-wrap; overflow-wrap: anywhere }
img { max-width: 100%; background: #ececec; display: block; margin: .5em 0 }
audio { display: block; width: 40em; max-width: 100% }
.error { color: #b00 }
"""


def save_page(manifest: Manifest, split: str, num_samples: int, folder: Path) -> Path:
    """Write `index.html` and the media of the first samples of a split, and return the page.

    Media that do not decode are replaced by the error message.
    """
    reader = SplitReader(manifest, split)
    folder.mkdir(parents=True, exist_ok=True)
    num_shown = min(num_samples, len(reader))
    articles = [
        _article(
            reader.read(index),
            index,
            float(reader.columns[index]["duration_ms"]),
            manifest.task,
            folder,
        )
        for index in range(num_shown)
    ]
    title = html.escape(f"{manifest.name}: {split}")
    page = (
        f'<!DOCTYPE html>\n<html><head><meta charset="utf-8"><title>{title}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        f"<p>{num_shown:,} of {len(reader):,} samples of task {manifest.task}</p>\n"
        f"{''.join(articles)}</body></html>\n"
    )
    path = folder / "index.html"
    write_atomic(path, page.encode())
    return path


def _article(sample: Sample, index: int, duration_ms: float, task: str, folder: Path) -> str:
    media = media_of(sample, IMAGE_EXTENSIONS + AUDIO_EXTENSIONS)
    # Names of members come from the tar, so they are not used as file names.
    blocks = [
        _medium(data, f"{index:05d}-{number}", name.rpartition(".")[2].lower(), folder)
        for number, (name, data) in enumerate(media)
    ]
    note = f"{duration_ms / 1000:.2f} s" if duration_ms else ""
    lines = (f'<p dir="auto">{html.escape(line)}</p>\n' for line in text_lines(sample, task))
    return (
        f"<article><h2>{index} {html.escape(str(sample['__key__']))} <small>{note}</small></h2>\n"
        f"{''.join(blocks)}{''.join(lines)}</article>\n"
    )


def _medium(data: bytes, stem: str, extension: str, folder: Path) -> str:
    """Write an image, or an audio clip with its spectrogram, and return the HTML that shows it."""
    try:
        if extension in IMAGE_EXTENSIONS:
            width, height = image_size(data)
            write_atomic(folder / f"{stem}.{extension}", data)
            return f'<img src="{stem}.{extension}" alt="" title="{width} x {height} pixels">\n'
        samples, sample_rate_hz = read_audio(data)
        panel = audio_panel(data)
    except DataError as error:
        return f'<p class="error">{html.escape(str(error))}</p>\n'
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, sample_rate_hz, "PCM_16", format="WAV")
    write_atomic(folder / f"{stem}.wav", buffer.getvalue())
    panel.save(folder / f"{stem}.png")
    return (
        f'<audio controls src="{stem}.wav"></audio>'
        f'<img src="{stem}.png" alt="waveform and spectrogram">\n'
    )
