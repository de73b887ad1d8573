"""CTC labels of transcripts, with pieces of adjustable size.

The first N merges of a byte-pair tokenizer (Sennrich et al., 2016) are themselves a tokenizer with smaller
pieces. Small speech datasets need small pieces, so that each occurs often enough. Labels are ids of the
full tokenizer, which decodes them.
"""

import re
from itertools import pairwise

from muomni.data.text.normalization import spoken_form
from muomni.data.text.tokenizer import Tokenizer

_SPACE = "\u2581"  # SentencePiece's word-start mark
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class CtcUnits:
    """Encodes transcripts with the first `num_merges` merges of a tokenizer (None: all).

    0 merges yield single characters. A character that the tokenizer lacks becomes its UTF-8 bytes.
    """

    def __init__(self, tokenizer: Tokenizer, num_merges: int | None) -> None:
        self.tokenizer = tokenizer
        self.num_merges = num_merges
        self._ids = tokenizer.pieces()
        merges = [p for p in self._ids if len(p) > 1 and not _BYTE.fullmatch(p)]
        self._merges = {piece: self._ids[piece] for piece in merges[:num_merges]}

    def encode(self, transcript: str) -> list[int]:
        """Label ids of a transcript; empty if it has no words."""
        text = spoken_form(transcript)
        if self.num_merges is None or not text:
            return self.tokenizer.encode(text)
        ids: list[int] = []
        for piece in self._merged(_SPACE + text.replace(" ", _SPACE)):
            if piece in self._ids:
                ids.append(self._ids[piece])
            else:
                ids.extend(self._ids[f"<0x{byte:02X}>"] for byte in piece.encode())
        return ids

    def _merged(self, text: str) -> list[str]:
        """Merge adjacent pieces, lowest merge rank first, until no merge applies."""
        pieces = list(text)
        while True:
            ranks = [
                (self._merges[left + right], index)
                for index, (left, right) in enumerate(pairwise(pieces))
                if left + right in self._merges
            ]
            if not ranks:
                return pieces
            _, index = min(ranks)
            pieces[index : index + 2] = [pieces[index] + pieces[index + 1]]
