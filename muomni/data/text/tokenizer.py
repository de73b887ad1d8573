"""The SentencePiece tokenizer of all stages, with special tokens for roles and media.

Roles and media are *control* symbols: no text encodes to them, so "<|assistant|>" typed by a user becomes
ordinary characters. Text is not normalized, so decoding is the inverse of encoding, except that U+2581
(SentencePiece's space mark) becomes a space. Nothing here imports torch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import sentencepiece

from muomni.errors import DataError
from muomni.io.hashing import sha256_bytes

PAD_ID, UNK_ID, BOS_ID, EOS_ID = 0, 1, 2, 3
MARKERS = (
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|image|>",
    "<|image_start|>",
    "<|image_end|>",
    "<|audio|>",
    "<|audio_start|>",
    "<|audio_end|>",
)
_SPACE_MARK = "\u2581"


class Characters(NamedTuple):
    """Character ids (UTF-8 bytes) of tokens; `token_positions[i]` is the index of the token of `ids[i]`."""

    ids: list[int]
    token_positions: list[int]


class Tokenizer:
    """Encodes and decodes text; `encode` never returns ids of special tokens."""

    def __init__(self, model: bytes, origin: str) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, TypeError) as error:
            raise DataError(f"{origin} is not a SentencePiece model") from error
        self._model = model
        self._origin = origin
        self.digest = sha256_bytes(model)
        found = tuple(
            getattr(self._processor, name)() for name in ("pad_id", "unk_id", "bos_id", "eos_id")
        )
        if found != (PAD_ID, UNK_ID, BOS_ID, EOS_ID):
            raise DataError(
                f"tokenizer {origin} has pad, unk, bos, eos ids {found}, not (0, 1, 2, 3); "
                "train one with `python -m data_prep tokenizer`"
            )
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = found
        markers = [self._marker_id(name) for name in MARKERS]
        self.system_id, self.user_id, self.assistant_id = markers[:3]
        self.image_id, self.image_start_id, self.image_end_id = markers[3:6]
        self.audio_id, self.audio_start_id, self.audio_end_id = markers[6:]
        self._without_text = {self.pad_id, self.bos_id, self.eos_id, *markers}

    @classmethod
    def load(cls, path: Path | str) -> "Tokenizer":
        """Read a model file; raises `DataError` if it is missing or lacks the special tokens."""
        try:
            model = Path(path).read_bytes()
        except OSError as error:
            raise DataError(
                f"cannot read tokenizer {path} ({error.strerror}); "
                f"train one with `python -m data_prep tokenizer --data DIR --out {path}`"
            ) from error
        return cls(model, str(path))

    @property
    def vocab_size(self) -> int:
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of the text, without BOS and EOS."""
        return self._processor.encode(text, out_type=int)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are skipped, and invalid UTF-8 becomes U+FFFD."""
        return self._processor.decode([int(i) for i in ids if int(i) not in self._without_text])

    def characters(self, ids: Sequence[int]) -> Characters:
        """Characters of the ids; special tokens have none."""
        pieces = [self._piece_bytes(int(i)) for i in ids]
        positions = [position for position, piece in enumerate(pieces) for _ in piece]
        return Characters([byte for piece in pieces for byte in piece], positions)

    def _piece_bytes(self, token_id: int) -> bytes:
        if token_id == UNK_ID or token_id in self._without_text:
            return b""
        piece = self._processor.id_to_piece(token_id)
        if self._processor.is_byte(token_id):
            return bytes([int(piece[3:-1], 16)])
        return piece.replace(_SPACE_MARK, " ").encode()

    def pieces(self) -> dict[str, int]:
        """Id of each text piece: bytes, merges in their order, and characters; no special tokens."""
        return {
            self._processor.id_to_piece(i): i
            for i in range(self.vocab_size)
            if i != UNK_ID and i not in self._without_text
        }

    def save(self, path: Path | str) -> None:
        """Write the model file, byte for byte as loaded."""
        Path(path).write_bytes(self._model)

    def __getstate__(self) -> tuple[bytes, str]:
        return self._model, self._origin

    def __setstate__(self, state: tuple[bytes, str]) -> None:
        self.__init__(*state)

    def _marker_id(self, name: str) -> int:
        piece = self._processor.piece_to_id(name)
        if piece == UNK_ID or not self._processor.is_control(piece):
            raise DataError(
                f"tokenizer {self._origin} lacks the special token {name}; "
                "train one with `python -m data_prep tokenizer`"
            )
        return piece
