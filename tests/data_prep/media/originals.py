"""Small files of all formats of images and audio clips, the originals of fuzzing."""

import io
import shutil
import subprocess

import numpy as np
import soundfile
from PIL import Image

from muomni.data.media.formats import Kind

RATE_HZ = 16_000
NUM_SAMPLES = 4_800
# Extension, and arguments of ffmpeg.
BY_FFMPEG = {
    "m4a": ("-c:a", "aac", "-f", "ipod", "-movflags", "+frag_keyframe+empty_moov"),
    "webm": ("-c:a", "libopus", "-f", "webm"),
    "aac": ("-c:a", "aac", "-f", "adts"),
}


def tone(num_channels: int = 1, num_samples: int = NUM_SAMPLES) -> np.ndarray:
    """A tone with noise, float32 [num_samples, num_channels]."""
    noise = np.random.default_rng(0).standard_normal((num_samples, num_channels))
    wave = 0.3 * np.sin(np.arange(num_samples) / 9)[:, None]
    return (wave + 0.01 * noise).astype(np.float32)


def encoded(kind: str, subtype: str | None = None, num_channels: int = 1) -> bytes:
    """A clip of 0.3 s, encoded by libsndfile."""
    buffer = io.BytesIO()
    soundfile.write(buffer, tone(num_channels), RATE_HZ, subtype, format=kind)
    return buffer.getvalue()


def without_first_frame(mp3: bytes) -> bytes:
    """An MP3 without its Xing header, whose length only its frames tell."""
    tag = mp3.index(b"Info" if b"Info" in mp3 else b"Xing")
    return mp3[mp3.index(mp3[:2], tag + 156) :]


def by_ffmpeg(*arguments: str, data: bytes, demuxer: str = "wav") -> bytes:
    """The output of ffmpeg for a file."""
    command = ["ffmpeg", "-v", "error", "-f", demuxer, "-i", "pipe:0", *arguments, "pipe:1"]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def _image(kind: str, mode: str = "RGB", **options: object) -> bytes:
    pixels = np.random.default_rng(1).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    pixels[:12] = 200
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def originals() -> dict[str, tuple[Kind, bytes]]:
    """Kind and bytes of each original by its name; those of ffmpeg only where it is installed."""
    frames = [Image.new("RGB", (32, 24), color) for color in ("red", "blue")]
    animation = {"save_all": True, "append_images": frames}
    exif = Image.Exif()
    exif[0x0112] = 6
    images = {
        "png": _image("PNG"),
        "png-palette": _image("PNG", "P"),
        "png-alpha": _image("PNG", "RGBA"),
        "jpeg": _image("JPEG", exif=exif),
        "jpeg-progressive": _image("JPEG", progressive=True),
        "jpeg-cmyk": _image("JPEG", "CMYK"),
        "jpeg-gray": _image("JPEG", "L"),
        "jpeg-without-end": _image("JPEG")[:-2],
        "webp": _image("WEBP"),
        "webp-lossless": _image("WEBP", "RGBA", lossless=True),
        "webp-animated": _image("WEBP", **animation),
        "gif": _image("GIF", **animation),
        "bmp": _image("BMP"),
        "avif": _image("AVIF"),
    }
    wav = encoded("WAV", "PCM_16")
    mp3 = encoded("MP3")
    audio = {
        "wav": wav,
        "wav-24": encoded("WAV", "PCM_24", 2),
        "wav-float": encoded("WAV", "FLOAT"),
        "wav-ulaw": encoded("WAV", "ULAW"),
        "wav-adpcm": encoded("WAV", "IMA_ADPCM"),
        "wav-gsm": encoded("WAV", "GSM610"),
        "wav-extensible": encoded("WAVEX", "PCM_16"),
        "rf64": encoded("RF64", "PCM_16"),
        "flac": encoded("FLAC", "PCM_16"),
        "flac-24": encoded("FLAC", "PCM_24", 2),
        "vorbis": encoded("OGG", "VORBIS"),
        "vorbis-chained": 2 * encoded("OGG", "VORBIS"),
        "opus": encoded("OGG", "OPUS"),
        "mp3": mp3,
        "mp3-without-xing": without_first_frame(mp3),
        "aiff": encoded("AIFF", "PCM_16"),
        "au": encoded("AU", "PCM_16"),
        "caf": encoded("CAF", "PCM_16"),
        "w64": encoded("W64", "PCM_16"),
        "sphere": encoded("NIST", "PCM_16"),
    }
    if shutil.which("ffmpeg"):
        for name, arguments in BY_FFMPEG.items():
            audio[name] = by_ffmpeg(*arguments, data=wav)
    kinds: tuple[tuple[Kind, dict[str, bytes]], ...] = (("image", images), ("audio", audio))
    return {name: (kind, data) for kind, files in kinds for name, data in files.items()}
