"""Decoding of images in all modes, of audio clips with all rates, and of broken files."""

import io

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageOps

from muomni.data.media.decode import AudioFacts, decode_audio, image_size, open_image, read_audio
from muomni.data.media.image import center_square, decode_image, plain_jpeg
from muomni.errors import DataError


def _encode(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _tone(rate: int, channels: int = 1, form: str = "FLAC", duration_s: float = 0.5) -> bytes:
    buffer = io.BytesIO()
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(int(duration_s * rate)) / rate)
    soundfile.write(buffer, np.stack([tone] * channels, axis=1), rate, format=form)
    return buffer.getvalue()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.new(mode, (40, 30))
    data = _encode(image, "JPEG" if mode == "CMYK" else "PNG")
    array = decode_image(data, 16)
    assert array.shape == (3, 16, 16)
    assert array.dtype == np.uint8


def test_transparency_is_blended_with_white() -> None:
    array = decode_image(_encode(Image.new("RGBA", (8, 8), (255, 0, 0, 0))), 8)
    assert (array == 255).all()
    half = decode_image(_encode(Image.new("RGBA", (8, 8), (0, 0, 0, 128))), 8)
    assert abs(int(half[0, 0, 0]) - 127) <= 1
    palette = Image.new("P", (8, 8))
    palette.putpalette([0, 0, 0])
    assert (decode_image(_encode(palette, transparency=0), 8) == 255).all()


def test_center_square_is_resized() -> None:
    image = Image.new("RGB", (300, 100), "red")
    image.paste("blue", (100, 0, 200, 100))
    array = decode_image(_encode(image), 50)
    assert (array[2, :, 5:45] == 255).all()
    assert (array[0, :, 5:45] == 0).all()


def jpeg(width: int, height: int) -> bytes:
    """A photo-like image: smooth gradients, an edge, and a little noise."""
    y, x = np.mgrid[0:height, 0:width]
    shades = [127 + 100 * np.sin(x / width * 7), 255 * y / height, 200.0 * (x + y > width)]
    noise = np.random.default_rng(0).normal(0, 4, (height, width, 3))
    pixels = (np.stack(shades, -1) + noise).clip(0, 255).astype(np.uint8)
    return _encode(Image.fromarray(pixels), "JPEG", quality=92)


@pytest.mark.parametrize("shape", [(640, 480), (300, 900), (1201, 1203)])
def test_large_jpeg_decoded_at_reduced_size_looks_the_same(
    shape: tuple[int, int],
) -> None:
    data = jpeg(*shape)
    assert min(open_image(data, 128).size) < min(shape)  # it was decoded at reduced size
    assert min(open_image(data, 128).size) >= 128
    whole = ImageOps.fit(open_image(data), (64, 64), method=Image.Resampling.BICUBIC)
    expected = np.asarray(whole, dtype=float).transpose(2, 0, 1)
    difference = np.abs(decode_image(data, 64) - expected)
    # Sides that are not multiples of 8 are rounded up, which shifts far edges by a fraction of a pixel.
    assert difference.mean() < 1.5 and np.quantile(difference, 0.98) < 8
    with pytest.raises(DataError, match="broken image"):
        decode_image(data[: len(data) // 2], 64)


@pytest.mark.parametrize("shape", [(200, 150), (151, 200), (40, 40), (30, 50)])
def test_slightly_larger_jpeg_is_decoded_in_full(shape: tuple[int, int]) -> None:
    """Resizing equals Pillow except for rounding differences of one level."""
    data = jpeg(*shape)
    assert open_image(data, 128).size == shape
    square = Image.fromarray(center_square(np.array(open_image(data))))
    resized = square.resize((64, 64), Image.Resampling.BICUBIC)
    expected = np.asarray(resized, dtype=int).transpose(2, 0, 1)
    difference = np.abs(decode_image(data, 64) - expected)
    assert difference.max() <= 1 and difference.mean() < 0.02


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("is_progressive", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (101, 57), (33, 200)])
def test_plain_jpeg_has_the_same_pixels_as_pillow(
    shape: tuple[int, int], is_progressive: bool, subsampling: int
) -> None:
    image = open_image(jpeg(*shape))
    data = _encode(image, "JPEG", subsampling=subsampling, progressive=is_progressive)
    for one in (
        data,
        data + b"bytes after the end",
        _encode(image, "JPEG", icc_profile=b"x" * 200),
    ):
        pixels = plain_jpeg(one, 128)
        assert pixels is not None
        np.testing.assert_array_equal(pixels, np.array(open_image(one)))


def test_other_images_are_decoded_by_pillow() -> None:
    data = jpeg(100, 80)
    image = open_image(data)
    exif = Image.Exif()
    exif[0x0112] = 3
    by_xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    others = [
        _encode(image), _encode(image, "JPEG", exif=exif), _encode(image, "JPEG", xmp=by_xmp),
        _encode(image.convert("L"), "JPEG"), _encode(image.convert("CMYK"), "JPEG"),
        data[:-100], data[:-2],
    ]  # fmt: skip
    assert all(plain_jpeg(other, 128) is None for other in others)
    assert plain_jpeg(data, 40) is None  # half of its size is enough
    assert plain_jpeg(data, 41) is not None
    rotated = decode_image(_encode(image, "JPEG", exif=exif), 32).astype(int)
    upright = decode_image(_encode(image, "JPEG"), 32)[:, ::-1, ::-1]
    assert np.abs(rotated - upright).max() <= 1


@pytest.mark.parametrize("offset", range(100, 3000, 211))
def test_damaged_jpeg_is_treated_as_by_pillow(offset: int) -> None:
    data = bytearray(jpeg(100, 80))
    data[offset : offset + 3] = b"\xff\x13\x77"
    try:
        expected = np.array(open_image(bytes(data)))
    except DataError:
        with pytest.raises(DataError, match="broken image"):
            decode_image(bytes(data), 64)
        return
    pixels = plain_jpeg(bytes(data), 128)
    assert pixels is None or np.array_equal(pixels, expected)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_jpeg_may_lack_its_end_marker(mode: str) -> None:
    data = _encode(open_image(jpeg(100, 80)).convert(mode), "JPEG")
    for cut in (data[:-2], data[:-1]):
        assert image_size(cut) == (100, 80)
        np.testing.assert_array_equal(np.array(open_image(cut)), np.array(open_image(data)))
        np.testing.assert_array_equal(decode_image(cut, 32), decode_image(data, 32))
    for missing in (8, 60, 900):
        for function in (image_size, open_image):
            with pytest.raises(DataError, match="broken image"):
                function(data[:-missing])


def test_progressive_jpeg_needs_its_end_marker() -> None:
    data = _encode(open_image(jpeg(100, 80)), "JPEG", progressive=True)
    for missing in (1, 2, 60):
        with pytest.raises(DataError, match="broken image"):
            open_image(data[:-missing])


def test_camera_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = _encode(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    assert open_image(data).size == (20, 40)


def test_broken_images_are_rejected() -> None:
    whole = _encode(Image.effect_noise((64, 64), 50))
    for data in (b"", b"no image", whole[: len(whole) // 2], whole[:30]):
        with pytest.raises(DataError, match="broken image") as caught:
            decode_image(data, 16)
        assert " at 0x" not in str(caught.value)


@pytest.mark.parametrize("rate", [8_000, 11_025, 16_000, 44_100])
@pytest.mark.parametrize("channels", [1, 2])
def test_audio_clips_become_mono_at_16_khz(rate: int, channels: int) -> None:
    data = _tone(rate, channels)
    facts = AudioFacts.of(*read_audio(data))
    assert (facts.duration_ms, facts.sample_rate_hz, facts.num_channels) == (500, rate, channels)
    samples = decode_audio(data)
    assert samples.dtype == np.float32
    assert abs(len(samples) - 8_000) <= 1
    spectrum = np.abs(np.fft.rfft(samples[1_000:7_000] * np.hanning(6_000)))
    assert abs(np.argmax(spectrum) * 16_000 / 6_000 - 440) < 4
    assert 0.45 < np.abs(samples[1_000:7_000]).max() < 0.55


@pytest.mark.parametrize("form", ["WAV", "FLAC", "OGG", "MP3"])
def test_audio_containers(form: str) -> None:
    assert 450 <= AudioFacts.of(*read_audio(_tone(16_000, form=form))).duration_ms <= 600


def test_broken_audio_clips_are_rejected() -> None:
    whole = _tone(16_000, duration_s=2.0)
    for data in (b"", b"no sound", whole[: len(whole) // 2], whole[:50]):
        with pytest.raises(DataError, match="broken audio clip") as caught:
            decode_audio(data)
        assert " at 0x" not in str(caught.value)
    with pytest.raises(DataError, match="zero length"):
        decode_audio(_tone(16_000, form="WAV", duration_s=0))
    buffer = io.BytesIO()
    values = np.array([0.0, np.nan, 0.1], dtype=np.float32)
    soundfile.write(buffer, values, 16_000, format="WAV", subtype="FLOAT")
    with pytest.raises(DataError, match="non-finite"):
        decode_audio(buffer.getvalue())


def test_16_bit_gray_keeps_its_levels() -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    array = decode_image(_encode(Image.fromarray(ramp)), 64)
    assert np.abs(array[0].astype(int) - (ramp >> 8)).max() <= 1


@pytest.mark.parametrize(
    ("form", "name"),
    [("GIF", "a GIF"), ("TIFF", "a TIFF"), ("BMP", "a BMP"), ("EPS", "a PostScript")],
)
def test_other_formats_are_named_and_not_opened(form: str, name: str) -> None:
    with pytest.raises(DataError, match=f"broken image .it is {name} "):
        open_image(_encode(Image.new("RGB", (8, 8)), form))


def test_truncated_wav_is_rejected() -> None:
    data = _tone(16_000, form="WAV")
    with pytest.raises(DataError, match="has 15900 of 16000 bytes"):
        read_audio(data[:-100])
    # Programs that write to a pipe cannot declare the length.
    offset = data.index(b"data") + 4
    piped = data[:offset] + b"\xff\xff\xff\xff" + data[offset + 4 :]
    assert len(read_audio(piped)[0]) == 8000


def test_declared_length_above_memory_is_rejected() -> None:
    data = bytearray(_tone(16_000))
    data[21] |= 0x0F
    data[22:26] = b"\xff\xff\xff\xff"
    with pytest.raises(DataError, match="broken audio clip"):
        read_audio(bytes(data))
