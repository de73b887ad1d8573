"""Tiny corpora of conversations, in the layout of each format; every writer returns the value of --src."""

import base64
import json
from pathlib import Path

from tests.data_prep.corpus_files import (
    TEXTS,
    write_audio_clips,
    write_file,
    write_images,
    write_jsonl,
    write_parquet,
)
from tests.data_prep.raw_corpora import image


def _question(number: int) -> str:
    return f"What about number {number}?"


def write_sharegpt(root: Path) -> Path:
    records = [
        {
            "conversations": [
                {"from": "human", "value": f"<image><image>{_question(n)}<audio>"},
                {"from": "gpt", "value": TEXTS[n]},
            ],
            "images": [name, name],
            "audios": [f"clip_{n}.wav"],
        }
        for n, name in enumerate(write_images(root))
    ]
    write_audio_clips(root)
    return write_file(root / "chats.json", json.dumps(records))


def write_openai(root: Path) -> Path:
    write_audio_clips(root)
    records = [
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": name}},
                        {"type": "input_audio", "input_audio": {"data": f"clip_{n}.wav"}},
                        {"type": "text", "text": _question(n)},
                    ],
                },
                {"role": "assistant", "content": TEXTS[n]},
            ]
        }
        for n, name in enumerate(write_images(root))
    ]
    return write_jsonl(root / "chats.jsonl", records)


def write_llava(root: Path) -> Path:
    records = [
        {
            **{"id": f"chat-{n}", "image": name},
            "conversations": [
                {"from": "human", "value": f"<image>\n{_question(n)}"},
                {"from": "gpt", "value": TEXTS[n]},
            ],
        }
        for n, name in enumerate(write_images(root))
    ]
    return write_file(root / "chats.json", json.dumps(records))


def write_alpaca(root: Path) -> Path:
    records = [{"instruction": _question(n), "input": "", "output": t} for n, t in enumerate(TEXTS)]
    return write_file(root / "alpaca.json", json.dumps(records))


def write_swift(root: Path) -> Path:
    """Questions with earlier rounds and an image, in base64 for every other record."""
    names = write_images(root)
    records = [
        {
            "query": f"<image>{_question(n)}",
            "response": text,
            "history": [["Ready?", "Yes."]],
            "images": [names[n] if n % 2 else base64.b64encode(image(n)).decode()],
        }
        for n, text in enumerate(TEXTS)
    ]
    return write_jsonl(root / "swift.jsonl", records)


def write_chat_parquet(root: Path) -> Path:
    """The Cauldron and LLaVA-OneVision: several images per row, and one or none."""
    several = [
        {
            "images": [{"bytes": image(n + k), "path": None} for k in range(1 + n % 2)],
            "texts": [{"user": _question(n), "assistant": text, "source": "ai2d"}] * 2,
        }
        for n, text in enumerate(TEXTS)
    ]
    write_parquet(root / "ai2d/train-00000-of-00001.parquet", several)
    one = [
        {
            "id": f"row-{n}",
            "image": {"bytes": image(n), "path": f"{n}.png"} if n else None,
            "conversations": [
                {"from": "human", "value": ("<image>\n" if n else "") + _question(n)},
                {"from": "gpt", "value": text},
            ],
        }
        for n, text in enumerate(TEXTS)
    ]
    write_parquet(root / "chartqa/train-00000-of-00001.parquet", one)
    return root


def write_messages(root: Path) -> Path:
    roles = ("user", "assistant")
    records = [{"messages": [{"role": role, "content": text} for role in roles]} for text in TEXTS]
    return write_jsonl(root / "chats.jsonl", records)
