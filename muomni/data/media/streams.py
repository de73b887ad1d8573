"""Prepares audio bytes so that libsndfile decodes them to the end, whatever length their headers declare.

Headers of files that were written to a pipe, joined, or edited do not give their length: WAV with a wrong
size, FLAC with 0 samples, MP3 without a Xing header (libsndfile only estimates it), and chained Ogg.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from muomni.data.media.formats import FLAC, MP3, OGG, WAV, detect_format, skip_tags
from muomni.errors import DataError

# Programs that write to a pipe declare a size from here on, since it is unknown.
_UNKNOWN_WAV_BYTES = 0x7FFF0000
# More than this after the samples of a WAV, and not chunks: its size is too small.
_MAX_TRAILING_BYTES = 4096
_MP3_IN_WAV = (0x50, 0x55)
_KBITS_OF_MPEG1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_KBITS_OF_MPEG2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_RATES_HZ = {0: (11_025, 12_000, 8_000), 2: (22_050, 24_000, 16_000), 3: (44_100, 48_000, 32_000)}
_ID3V1_BYTES = 128
_MAX_FLAC_SAMPLES = 2**36 - 1
_Order = Literal["little", "big"]


@dataclass(frozen=True, slots=True)
class AudioStream:
    """Bytes that libsndfile decodes to their end.

    Args:
        data: the bytes to open.
        num_samples: samples that must be there; None: as many as libsndfile says; 0: unknown.
        num_skipped: samples at the start that do not belong to the clip.
        num_counted: samples by the frames of an MP3, if its header does not tell their number.
    """

    data: bytes
    num_samples: int | None = None
    num_skipped: int = 0
    num_counted: int = 0


def audio_streams(data: bytes) -> list[AudioStream]:
    """The streams of an audio clip, one after the other in time; raises `DataError` if it is truncated."""
    found = detect_format(data)
    if found is WAV:
        return [_wav_stream(data)]
    if found is FLAC:
        return [_flac_stream(data)]
    if found is OGG:
        return _ogg_streams(data)
    return [_mp3_stream(data) if found is MP3 else AudioStream(data)]


def _wav_stream(data: bytes) -> AudioStream:
    order: _Order = "big" if data[:4] == b"RIFX" else "little"
    is_mp3 = False
    num_long = None
    position = 12
    while position + 8 <= len(data):
        name = data[position : position + 4]
        num_bytes = int.from_bytes(data[position + 4 : position + 8], order)
        start = position + 8
        if name == b"data":
            declared = num_bytes if num_long is None else num_long
            num_bytes = _wav_bytes(data, start, declared, order)
            if is_mp3:
                return _mp3_stream(data[start : start + num_bytes])
            return AudioStream(_with_wav_size(data, start, num_bytes, order))
        if name == b"fmt ":
            is_mp3 = int.from_bytes(data[start : start + 2], order) in _MP3_IN_WAV
        if name == b"ds64" and data[:4] == b"RF64":
            num_long = int.from_bytes(data[start + 8 : start + 16], order)
        position = start + num_bytes + num_bytes % 2
    return AudioStream(data)


def _wav_bytes(data: bytes, start: int, declared: int, order: _Order) -> int:
    """The size of the samples of a WAV from `start`; raises `DataError` if the file is truncated."""
    num_present = len(data) - start
    if declared >= _UNKNOWN_WAV_BYTES and declared > num_present:
        return num_present
    if declared > num_present:
        # Only a file that also ends before its outer size is truncated; some count their header as samples.
        num_outer = int.from_bytes(data[4:8], order) + 8
        if abs(num_outer - len(data)) > 1 and declared - num_present > start:
            raise DataError(f"broken audio clip (has {num_present} of {declared} bytes)")
        return num_present
    rest = data[start + declared + declared % 2 :]
    if declared == 0:
        return 0 if _is_chunks(rest, order) else num_present
    is_trailing = len(rest) <= _MAX_TRAILING_BYTES or _is_chunks(rest, order)
    return declared if is_trailing or not rest.strip(b"\0") else num_present


def _is_chunks(rest: bytes, order: _Order) -> bool:
    """Whether bytes begin with a chunk, such as `LIST`, that fits into them."""
    name, num_bytes = rest[:4], int.from_bytes(rest[4:8], order)
    return not rest or (
        name.isascii() and name.decode("ascii").isprintable() and num_bytes <= len(rest)
    )


def _with_wav_size(data: bytes, start: int, num_bytes: int, order: _Order) -> bytes:
    """The file with the right size; RF64 becomes an ordinary WAV, whose size fits."""
    size = num_bytes.to_bytes(4, order)
    if data[:4] == b"RF64":
        header = data[:start].replace(b"RF64", b"RIFF", 1).replace(b"ds64", b"JUNK", 1)
    elif data[start - 4 : start] == size:
        return data
    else:
        header = data[:start]
    return header[:-4] + size + data[start:]


def _flac_stream(data: bytes) -> AudioStream:
    """Declare the largest number of samples, so that libFLAC decodes to the end."""
    start = _flac_field(data)
    field = data[start : start + 5]
    num_samples = int.from_bytes(field, "big") & _MAX_FLAC_SAMPLES
    return AudioStream(with_flac_samples(data, _MAX_FLAC_SAMPLES), num_samples)


def with_flac_samples(data: bytes, num_samples: int) -> bytes:
    """A FLAC file whose header declares `num_samples`."""
    start = _flac_field(data)
    if len(data) < start + 5:
        return data
    field = (data[start] >> 4 << 36 | num_samples).to_bytes(5, "big")
    return data if data[start : start + 5] == field else data[:start] + field + data[start + 5 :]


def _flac_field(data: bytes) -> int:
    """Where the number of samples starts, whose lower 36 bits of 5 bytes count."""
    return skip_tags(data, 0) + 21


def joined_streams(data: bytes) -> list[AudioStream]:
    """The streams of a FLAC that cannot be decoded as one: joined files, or bytes behind the last frame."""
    position = skip_tags(data, 0) if detect_format(data) is FLAC else len(data)
    starts = [0]
    while (position := data.find(b"fLaC", position + 1)) > 0:
        if data[position + 4 : position + 8] in (b"\0\0\0\x22", b"\x80\0\0\x22"):
            starts.append(position)
    return [AudioStream(data[start:end]) for start, end in pairwise([*starts, len(data)])]


def _ogg_streams(data: bytes) -> list[AudioStream]:
    """Links of a chained Ogg; raises `DataError` if its last page is truncated."""
    last = data.rfind(b"OggS")
    if _page_end(data, last) > len(data):
        raise DataError("broken audio clip (its last Ogg page is truncated)")
    starts = [0]
    begin_end = _page_end(data, 0)
    position = 0
    while (position := data.find(b"OggS\0\2", position + 1)) > 0:
        # Streams that begin together belong to one link.
        if position != begin_end:
            starts.append(position)
        begin_end = _page_end(data, position)
    return [AudioStream(data[start:end]) for start, end in pairwise([*starts, len(data)])]


def _page_end(data: bytes, start: int) -> int:
    num_segments = int.from_bytes(data[start + 26 : start + 27], "big")
    lacing = data[start + 27 : start + 27 + num_segments]
    return start + 27 + num_segments + sum(lacing)


def _mp3_stream(data: bytes) -> AudioStream:
    """Keep an MP3 whose Xing header counts all frames; otherwise begin it with a small silent frame.

    libsndfile then overestimates the length, and reads to the end.
    """
    start = skip_tags(data, 0)
    if not _frame_bytes(data[start + 1 : start + 3]):
        return AudioStream(data)
    tag = start + _xing_offset(data, start)
    if data[tag : tag + 4] in (b"Xing", b"Info") and len(data) > tag + 16:
        num_declared = int.from_bytes(data[tag + 8 : tag + 12], "big") if data[tag + 7] & 1 else 0
        first = start + _frame_bytes(data[start + 1 : start + 3])
        if num_declared and _num_frames(data, first) <= num_declared + 1:
            return AudioStream(_with_xing_size(data, start, tag))
        start = first if _frame_bytes(data[first + 1 : first + 3]) else start
    if len(data) < start + 4:
        return AudioStream(data)
    second, third, fourth = data[start + 1 : start + 4]
    # The lowest bit rate, without checksum and padding.
    head = bytes([0xFF, second | 1, 0x10 | third & 0x0D, fourth])
    silence = head + bytes(_frame_bytes(head[1:3]) - 4)
    num_skipped = 1152 if _is_mpeg1(second) else 576
    num_counted = _num_frames(data, start) * num_skipped
    return AudioStream(silence + data[start:], 0, num_skipped, num_counted)


def _is_mpeg1(second: int) -> bool:
    return second >> 3 & 3 == 3


def _xing_offset(data: bytes, start: int) -> int:
    """Where the first frame has the tag of a Xing header; depends on MPEG version and channels."""
    is_mono = data[start + 3 : start + 4] >= b"\xc0"
    if _is_mpeg1(data[start + 1]):
        return 4 + (17 if is_mono else 32)
    return 4 + (9 if is_mono else 17)


@lru_cache(maxsize=1 << 16)
def _frame_bytes(header: bytes) -> int:
    """Size of a frame of layer III by the second and third byte of its header; 0 if it is none."""
    if len(header) < 2:
        return 0
    second, third = header
    version, rate, kbits = second >> 3 & 3, third >> 2 & 3, third >> 4
    if second >> 5 != 7 or second >> 1 & 3 != 1 or version == 1 or rate == 3 or kbits in (0, 15):
        return 0
    bits = 1000 * (_KBITS_OF_MPEG1 if version == 3 else _KBITS_OF_MPEG2)[kbits]
    return (144 if version == 3 else 72) * bits // _RATES_HZ[version][rate] + (third >> 1 & 1)


def _num_frames(data: bytes, position: int) -> int:
    """Frames of layer III from `position` to the end, or to bytes that are neither a frame nor a tag."""
    count = 0
    while position < len(data):
        num_bytes = _frame_bytes(data[position + 1 : position + 3]) if data[position] == 0xFF else 0
        if num_bytes:
            count += 1
        elif data[position : position + 3] == b"TAG":
            num_bytes = _ID3V1_BYTES
        else:
            num_bytes = skip_tags(data, position) - position
        if not num_bytes:
            break
        position += num_bytes
    return count


def _with_xing_size(data: bytes, start: int, tag: int) -> bytes:
    """The bytes from `start`, whose size a Xing header declares: libsndfile prints a warning if it differs."""
    num_bytes = len(data) - start - (_ID3V1_BYTES if data[-_ID3V1_BYTES:][:3] == b"TAG" else 0)
    size = max(0, num_bytes).to_bytes(4, "big")
    if not data[tag + 7] & 2 or data[tag + 12 : tag + 16] == size:
        return data[start:] if start else data
    return data[start : tag + 12] + size + data[tag + 16 :]
