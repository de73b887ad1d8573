"""Transcripts as labels for CTC: the spoken words, in pieces as small as one chooses.

The pieces of a byte-pair tokenizer come from merges in order, so its first N merges are a smaller
tokenizer inside it (Sennrich et al., 2016). Little speech needs small pieces, since each must be
heard often enough; much speech can afford large ones. The ids are the tokenizer's own either
way, so that it decodes them.
"""

import re
from itertools import pairwise

from muomni.data.text.tokenizer import Tokenizer

_SPACE = "\u2581"  # SentencePiece's mark of a word's beginning
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_NOT_SPOKEN = re.compile(r"[^\w']+|_")


def spoken_form(text: str) -> str:
    """Lower case, and words only: an audio clip has no capitals and no punctuation."""
    return " ".join(_NOT_SPOKEN.sub(" ", text.lower()).split())


class CtcUnits:
    """Encodes transcripts with the first `num_merges` merges of a tokenizer; None means all.

    0 gives single characters. A character that the tokenizer lacks becomes its UTF-8 bytes.
    """

    def __init__(self, tokenizer: Tokenizer, num_merges: int | None) -> None:
        self.tokenizer = tokenizer
        self.num_merges = num_merges
        self._ids = tokenizer.pieces()
        merges = [p for p in self._ids if len(p) > 1 and not _BYTE.fullmatch(p)]
        self._merges = {piece: self._ids[piece] for piece in merges[:num_merges]}

    def encode(self, transcript: str) -> list[int]:
        """Ids of the spoken words of a transcript; empty when there are none."""
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
        """Join neighbors, the earliest merge first, until no merge applies."""
        pieces = list(text)
        while True:
            ranks = [
                (self._merges[left + right], place)
                for place, (left, right) in enumerate(pairwise(pieces))
                if left + right in self._merges
            ]
            if not ranks:
                return pieces
            _, place = min(ranks)
            pieces[place : place + 2] = [pieces[place] + pieces[place + 1]]
