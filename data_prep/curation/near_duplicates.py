"""Find near-duplicate images and texts without comparing all pairs.

Images: a 64-bit perceptual hash (signs of the low frequencies of a cosine transform, as in pHash), and a
small color thumbnail, since the hash ignores color. Texts: MinHash signatures (Broder 1997) of all runs
of eight bytes. Candidate pairs agree in a part of the hash: by the pigeonhole principle no pair within
the distance is missed, and of texts at the default similarity about 1 in 20,000.
"""

import unicodedata
from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
from PIL import Image

from muomni.data.media.decode import open_image
from muomni.data.text.normalization import remove_format, words_of

_GRAY_SIDE = 32
_HASH_SIDE = 8
# Images with a lower standard deviation of gray levels (0 to 255) have too little structure for a hash.
_MIN_CONTRAST = 2.0
_THUMBNAIL_SIDE = 8
# Maximum color difference (0 to 255) of similar thumbnails: mean, and largest of all cells, which
# distinguishes small colored objects on white.
_MAX_MEAN_DIFFERENCE = 10.0
_MAX_CELL_DIFFERENCE = 64
_SHINGLE_BYTES = 8
_NUM_BANDS, _ROWS_PER_BAND = 25, 5
NUM_HASHES = _NUM_BANDS * _ROWS_PER_BAND
# In a long run of equal keys, each member is compared with this many successors. Neighbors are always
# joined, so similar samples still form one group.
_MAX_LAG = 256

# Pairs compared at a time, to bound memory.
_PART = 65536
_PRIME = np.uint64(0x9E3779B97F4A7C15)
_STEPS = np.arange(_GRAY_SIDE)
_COSINES = np.cos(np.pi * np.outer(np.arange(_HASH_SIDE + 1), _STEPS + 0.5) / _GRAY_SIDE)
_BITS = np.uint64(1) << np.arange(_HASH_SIDE * _HASH_SIDE, dtype=np.uint64)
_RANDOM = np.random.Generator(np.random.Philox(20))
# Odd factors and offsets of multiply-shift hashing.
_FACTORS = _RANDOM.integers(2**64, size=(NUM_HASHES, 1), dtype=np.uint64) | np.uint64(1)
_OFFSETS = _RANDOM.integers(2**64, size=(NUM_HASHES, 1), dtype=np.uint64)


def plain_words(text: str) -> str:
    """The words of a text in lower case, without punctuation, format characters, and compatibility forms."""
    plain = unicodedata.normalize("NFKC", remove_format(text)).casefold()
    return " ".join(words_of(plain))


def image_signature(data: bytes) -> tuple[int, np.ndarray] | None:
    """Hash and thumbnail, uint8 [side * side * 3], of an image; None for a uniform area.

    Raises `DataError` if the image is broken.
    """
    image = open_image(data)
    gray = image.convert("L").resize((_GRAY_SIDE, _GRAY_SIDE), Image.Resampling.BOX)
    levels = np.asarray(gray, dtype=np.float64)
    if levels.std() < _MIN_CONTRAST:
        return None
    # Frequency 0 is brightness, not structure.
    waves = (_COSINES @ levels @ _COSINES.T)[1:, 1:].ravel()
    number = int(_BITS[waves > np.median(waves)].sum())
    thumbnail = image.resize((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BOX)
    return number, np.asarray(thumbnail, dtype=np.uint8).ravel()


def text_signature(words: str) -> np.ndarray | None:
    """The MinHash signature, uint32 [NUM_HASHES], of a text; None if it is too short."""
    content = np.frombuffer(words.encode(errors="surrogatepass"), dtype=np.uint8)
    if len(content) < _SHINGLE_BYTES:
        return None
    windows = np.lib.stride_tricks.sliding_window_view(content, _SHINGLE_BYTES)
    shingles = np.unique(np.ascontiguousarray(windows).view("<u8").ravel())
    minima = np.full((NUM_HASHES, 1), np.iinfo(np.uint64).max, dtype=np.uint64)
    # In chunks, to bound the memory for the hashes of a book.
    for start in range(0, len(shingles), 4096):
        hashes = shingles[start : start + 4096] * _FACTORS + _OFFSETS
        minima = np.minimum(minima, hashes.min(axis=1, keepdims=True))
    return (minima[:, 0] >> np.uint64(32)).astype(np.uint32)


def near_duplicate_images(
    hashes: np.ndarray, thumbnails: np.ndarray, max_distance: int
) -> np.ndarray:
    """Pairs [num_pairs, 2] of images whose hashes differ in at most `max_distance` bits.

    `hashes` are uint64 [N], `thumbnails` uint8 [N, side * side * 3]; the colors must be similar too.
    """
    keys = _rows_as_hashes(np.column_stack([hashes, _rows_as_hashes(thumbnails)]))
    found = [equal_neighbors(keys)]
    # Equal images are joined above; only one of them is searched for.
    chosen = np.unique(keys, return_index=True)[1]
    distinct = hashes[chosen]
    for mask in _bit_masks(max_distance):
        for first, second in _pairs_of_equal(distinct & mask):
            close = bit_distance(distinct[first], distinct[second]) <= max_distance
            found.append(np.column_stack([chosen[first[close]], chosen[second[close]]]))
    pairs = np.unique(np.concatenate(found), axis=0)
    parts = np.array_split(pairs, len(pairs) // _PART + 1)
    return np.concatenate([part[_have_like_colors(thumbnails, part)] for part in parts])


def _have_like_colors(thumbnails: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    first, second = thumbnails[pairs[:, 0]], thumbnails[pairs[:, 1]]
    difference = np.abs(first.astype(np.int16) - second.astype(np.int16))
    is_like = difference.mean(axis=1) <= _MAX_MEAN_DIFFERENCE
    return is_like & (difference.max(axis=1, initial=0) <= _MAX_CELL_DIFFERENCE)


def near_duplicate_texts(signatures: np.ndarray, min_similarity: float) -> np.ndarray:
    """Pairs [num_pairs, 2] of texts whose signatures, [N, NUM_HASHES], have at least this similarity.

    The fraction of equal minima estimates the Jaccard similarity of the byte runs of two texts.
    """
    keys = _rows_as_hashes(signatures)
    found = [equal_neighbors(keys)]
    chosen = np.unique(keys, return_index=True)[1]
    distinct = signatures[chosen]
    for band in range(_NUM_BANDS):
        rows = distinct[:, band * _ROWS_PER_BAND : (band + 1) * _ROWS_PER_BAND]
        for first, second in _pairs_of_equal(_rows_as_hashes(rows)):
            for part in np.array_split(np.arange(len(first)), len(first) // _PART + 1):
                one, other = first[part], second[part]
                close = similarity(distinct[one], distinct[other]) >= min_similarity
                found.append(np.column_stack([chosen[one[close]], chosen[other[close]]]))
    return np.unique(np.concatenate(found), axis=0)


def bit_distance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The number of bits in which uint64 numbers differ."""
    different = np.ascontiguousarray(np.atleast_1d(first ^ second))
    bits = np.unpackbits(different.view(np.uint8).reshape(len(different), 8), axis=1)
    return bits.sum(axis=1)


def similarity(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Fraction of equal minima of signatures [N, NUM_HASHES]."""
    return (first == second).mean(axis=1)


def _rows_as_hashes(rows: np.ndarray) -> np.ndarray:
    """A uint64 hash for each row of integers."""
    mixed = np.zeros(len(rows), dtype=np.uint64)
    for column in rows.T:
        mixed = (mixed ^ column) * _PRIME
        mixed ^= mixed >> np.uint64(29)
    return mixed


def _bit_masks(max_distance: int) -> Iterator[np.ndarray]:
    """Masks of which at least one hides all bits in which two near hashes differ.

    The bits are divided into d + 2 blocks; d differing bits leave two blocks unaffected.
    """
    bounds = np.linspace(0, 64, max_distance + 3).astype(int)
    blocks = [sum(1 << bit for bit in range(start, end)) for start, end in pairwise(bounds)]
    for one, other in combinations(blocks, 2):
        yield np.array(one | other, dtype=np.uint64)


def equal_neighbors(keys: np.ndarray) -> np.ndarray:
    """Pairs [num_pairs, 2] that link all indices of equal keys into a chain."""
    order = np.argsort(keys, kind="stable")
    same = keys[order[1:]] == keys[order[:-1]]
    return np.column_stack([order[:-1][same], order[1:][same]])


def _pairs_of_equal(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Index pairs of equal keys: neighbors in sorted order, then those two apart, and so on."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    active = np.arange(len(keys))
    for lag in range(1, _MAX_LAG + 1):
        active = active[active + lag < len(keys)]
        active = active[ordered[active] == ordered[active + lag]]
        if not len(active):
            return
        yield order[active], order[active + lag]
