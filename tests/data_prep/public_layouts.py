"""A tiny corpus in the layout of each registered format; every writer returns the value of --src."""

import base64
import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pyarrow
import pyarrow.parquet

from muomni.data.shards.manifest import Task
from tests.data_prep.raw_corpora import (
    audio,
    image,
    write_coco,
    write_librispeech,
    write_ljspeech,
)

NUM_SAMPLES = 6
TEXTS = [f"Sentence number {n}." for n in range(NUM_SAMPLES)]


def write_file(path: Path, content: bytes | str) -> Path:
    """Write a file and its parent folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_jsonl(path: Path, records: Iterable[object]) -> Path:
    text = "".join(json.dumps(record) + "\n" for record in records)
    return write_file(path, gzip.compress(text.encode()) if path.suffix == ".gz" else text)


def write_parquet(path: Path, rows: list[dict], rows_a_group: int = 2) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=rows_a_group)
    return path


def _images(folder: Path) -> list[str]:
    names = [f"{n:05d}.png" for n in range(NUM_SAMPLES)]
    for number, name in enumerate(names):
        write_file(folder / name, image(number))
    return names


def _audio_clips(folder: Path, ending: str = "wav") -> list[str]:
    names = [f"clip_{n}.{ending}" for n in range(NUM_SAMPLES)]
    for number, name in enumerate(names):
        write_file(folder / name, audio(number, fmt=ending.upper()))
    return names


def write_table(root: Path, suffix: str, rows: list[dict]) -> Path:
    if suffix == "jsonl":
        return write_jsonl(root / "table.jsonl", rows)
    path = root / f"table.{suffix}"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if suffix == "tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def _image_rows(root: Path) -> list[dict]:
    return [
        {"image": name, "caption": text} for name, text in zip(_images(root), TEXTS, strict=True)
    ]


def _speech_rows(root: Path) -> list[dict]:
    return [
        {"audio": name, "text": text, "speaker": "anna"}
        for name, text in zip(_audio_clips(root), TEXTS, strict=True)
    ]


def write_flickr30k(root: Path) -> Path:
    """The token file, with two captions per image."""
    names = _images(root / "flickr30k-images")
    lines = [
        f"{name}#{n}\t{text} ({n})"
        for n in range(2)
        for name, text in zip(names, TEXTS, strict=True)
    ]
    write_file(root / "results_20130124.token", "\n".join(lines) + "\n")
    return root


def write_flickr30k_csv(root: Path) -> Path:
    """The table of the Kaggle archive, in its own folder beside the images."""
    names = _images(root / "flickr30k_images/flickr30k_images")
    lines = ["image_name| comment_number| comment"]
    lines += [f"{name}| 0| {text}" for name, text in zip(names, TEXTS, strict=True)]
    write_file(root / "flickr30k_images/results.csv", "\n".join(lines) + "\n")
    return root


def write_cc3m(root: Path) -> Path:
    names = _images(root / "train")
    lines = [f"{text}\ttrain/{name}\n" for name, text in zip(names, TEXTS, strict=True)]
    return write_file(root / "Train_GCC-training.tsv", "".join(lines))


def write_image_folder(root: Path) -> Path:
    for number, name in enumerate(_images(root / "train/deep/er")):
        write_file(root / "train/deep/er" / f"{name[:-4]}.txt", TEXTS[number])
    return root


def write_img2dataset(root: Path) -> Path:
    for number, text in enumerate(TEXTS):
        stem = root / f"{number // 3:05d}/{number // 3:05d}{number % 3:04d}"
        write_file(stem.with_suffix(".jpg"), image(number, kind="JPEG"))
        write_file(stem.with_suffix(".txt"), text)
        facts = {"url": f"http://a.example/{number}.jpg", "caption": text, "status": "success"}
        write_file(stem.with_suffix(".json"), json.dumps(facts))
    write_file(root / "00000_stats.json", "{}")
    return root


def write_image_parquet(root: Path) -> Path:
    rows = [
        {"image": {"bytes": image(n), "path": f"pic{n}.png"}, "caption": text}
        for n, text in enumerate(TEXTS)
    ]
    write_parquet(root / "data/train-00000-of-00001.parquet", rows)
    return root


def write_commonvoice(root: Path) -> Path:
    """The folder of one language with two clips per split."""
    names = _audio_clips(root / "en/clips", "mp3")
    header = "client_id\tpath\tsentence\tup_votes\tage\tgender\taccents\tlocale\n"
    for number, split in enumerate(("train", "dev", "test")):
        lines = [
            f"speaker{n}\t{names[n]}\t{TEXTS[n]}\t2\t\tfemale\t\ten\n"
            for n in (2 * number, 2 * number + 1)
        ]
        write_file(root / f"en/{split}.tsv", header + "".join(lines))
    return root / "en"


def write_nemo(root: Path) -> Path:
    """Segments of a 3 s audio file, followed by whole files."""
    write_file(root / "long.wav", audio(1, duration_s=3.0))
    records = [
        {"audio_filepath": "long.wav", "text": text, "offset": n * 0.5, "duration": 0.5}
        for n, text in enumerate(TEXTS)
    ]
    whole = {"audio_filepath": "short.wav", "text": "Whole file.", "duration": 0.3, "lang": "en"}
    write_file(root / "short.wav", audio(2))
    return write_jsonl(root / "train_manifest.json", [*records, whole])


def lhotse_recording(name: str, path: str, duration_s: float) -> dict:
    source = {"type": "file", "channels": [0], "source": path}
    return {
        **{"id": name, "sources": [source], "sampling_rate": 16_000},
        **{"num_samples": int(16_000 * duration_s), "duration": duration_s, "channel_ids": [0]},
    }


def lhotse_supervision(number: int, start_s: float, duration_s: float = 0.5) -> dict:
    return {
        **{"id": f"sup-{number}", "recording_id": "long", "start": start_s, "channel": 0},
        **{"duration": duration_s, "text": TEXTS[number], "language": "English", "speaker": "s1"},
    }


def write_lhotse(root: Path) -> Path:
    write_file(root / "long.wav", audio(1, duration_s=3.0))
    write_jsonl(
        root / "corpus_recordings_train.jsonl.gz", [lhotse_recording("long", "long.wav", 3.0)]
    )
    supervisions = [lhotse_supervision(n, n * 0.5) for n in range(NUM_SAMPLES)]
    write_jsonl(root / "corpus_supervisions_train.jsonl.gz", supervisions)
    return root


def gigaspeech_segment(number: int, text: str, *subsets: str) -> dict:
    return {
        **{"sid": f"POD1_S{number:07d}", "speaker": "N/A", "text_tn": text},
        **{"begin_time": number * 0.5, "end_time": number * 0.5 + 0.5},
        "subsets": [f"{{{name}}}" for name in subsets],
    }


def write_gigaspeech(root: Path, segments: list[dict] | None = None) -> Path:
    write_file(root / "audio/podcast/POD1.opus", audio(1, 3.0, fmt="OGG", subtype="OPUS"))
    if segments is None:
        segments = [gigaspeech_segment(n, f"NUMBER {n}", "XL") for n in range(NUM_SAMPLES)]
    podcast = {"aid": "POD1", "path": "audio/podcast/POD1.opus", "segments": segments}
    content = {"dataset": "GigaSpeech", "audios": [podcast]}
    write_file(root / "GigaSpeech.json", json.dumps(content))
    return root


def write_libritts(root: Path) -> Path:
    for number, text in enumerate(TEXTS):
        name = f"84_{121 + number % 2}_{number:06d}_000000"
        folder = root / "LibriTTS/dev-clean/84" / f"{121 + number % 2}"
        write_file(folder / f"{name}.wav", audio(number, rate=24_000))
        write_file(folder / f"{name}.normalized.txt", text)
        write_file(folder / f"{name}.original.txt", text.replace("number", "No."))
    return root


def write_arctic(root: Path) -> Path:
    folder = root / "cmu_us_bdl_arctic"
    for number in range(NUM_SAMPLES):
        write_file(folder / f"wav/arctic_a{number:04d}.wav", audio(number))
    lines = [f'( arctic_a{number:04d} "{text}" )\n' for number, text in enumerate(TEXTS)]
    write_file(folder / "etc/txt.done.data", "".join(lines))
    return folder


def write_vctk(root: Path) -> Path:
    write_file(
        root / "speaker-info.txt",
        "ID  AGE  GENDER  ACCENTS  REGION COMMENTS \np225  23  F    English    Southern  England\n",
    )
    for number, text in enumerate(TEXTS):
        name = f"p225_{number:03d}"
        write_file(root / f"txt/p225/{name}.txt", f"{text}\n")
        for mic in (1, 2):
            path = root / f"wav48_silence_trimmed/p225/{name}_mic{mic}.flac"
            write_file(path, audio(number + mic, rate=48_000, fmt="FLAC"))
    return root


def write_speech_parquet(root: Path) -> Path:
    rows = [
        {"audio": {"bytes": audio(n), "path": f"{n}.wav"}, "text": text}
        for n, text in enumerate(TEXTS)
    ]
    return write_parquet(root / "train.parquet", rows)


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
        for n, name in enumerate(_images(root))
    ]
    _audio_clips(root)
    return write_file(root / "chats.json", json.dumps(records))


def write_openai(root: Path) -> Path:
    _audio_clips(root)
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
        for n, name in enumerate(_images(root))
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
        for n, name in enumerate(_images(root))
    ]
    return write_file(root / "chats.json", json.dumps(records))


def write_alpaca(root: Path) -> Path:
    records = [{"instruction": _question(n), "input": "", "output": t} for n, t in enumerate(TEXTS)]
    return write_file(root / "alpaca.json", json.dumps(records))


def write_swift(root: Path) -> Path:
    """Questions with earlier rounds and an image, in base64 for every other record."""
    names = _images(root)
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


def write_tar(path: Path, members: Iterable[tuple[str, bytes | str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_mls(root: Path) -> Path:
    lines = []
    for number, text in enumerate(TEXTS):
        name = f"12_{34 + number % 2}_{number:06d}"
        write_file(
            root / f"train/audio/12/{34 + number % 2}/{name}.flac", audio(number, fmt="FLAC")
        )
        lines.append(f"{name}\t{text}\n")
    write_file(root / "train/transcripts.txt", "".join(lines))
    write_file(root / "train/segments.txt", "12_34_000000\thttp://a.example/x.mp3\t0\t1\n")
    return root


def write_kaldi(root: Path) -> Path:
    """A recipe's folder `data` with segments; paths are relative to the recipe."""
    write_file(root / "audio/long.wav", audio(1, duration_s=3.0))
    names = [f"anna-{number}" for number in range(NUM_SAMPLES)]
    folder = root / "data/train"
    write_file(folder / "wav.scp", "long audio/long.wav\n")
    segments = [f"{name} long {n * 0.5} {n * 0.5 + 0.5}\n" for n, name in enumerate(names)]
    write_file(folder / "segments", "".join(segments))
    write_file(folder / "text", "".join(f"{n} {t}\n" for n, t in zip(names, TEXTS, strict=True)))
    write_file(folder / "utt2spk", "".join(f"{name} anna\n" for name in names))
    return root / "data"


def write_aishell(root: Path) -> Path:
    names = [f"BAC009S0002W{number:04d}" for number in range(NUM_SAMPLES)]
    for number, name in enumerate(names):
        write_file(root / f"data_aishell/wav/train/S0002/{name}.wav", audio(number))
    lines = "".join(f"{name} 而 对 楼市 {'零一二三四五'[n]}\n" for n, name in enumerate(names))
    write_file(root / "data_aishell/transcript/aishell_transcript_v0.8.txt", lines)
    return root


def shar_cut(number: int, supervisions: list[dict]) -> dict:
    recording = lhotse_recording("long", "", 0.5)
    recording["sources"] = [{"type": "shar", "channels": [0], "source": ""}]
    return {
        **{"id": f"cut-0.{number}", "type": "MonoCut", "start": 0, "duration": 0.5, "channel": 0},
        **{"supervisions": supervisions, "recording": recording},
    }


def write_shar(root: Path) -> Path:
    """Two cuts in each of three shards."""
    cuts = [shar_cut(n, [lhotse_supervision(n, 0.0)]) for n in range(NUM_SAMPLES)]
    for shard in range(3):
        own = cuts[2 * shard : 2 * shard + 2]
        write_jsonl(root / f"train/cuts.{shard:06d}.jsonl.gz", own)
        members: list[tuple[str, bytes | str]] = []
        for cut in own:
            members.append((f"{cut['id']}.flac", audio(len(members), 0.5, fmt="FLAC")))
            members.append((f"{cut['id']}.json", json.dumps(cut["recording"])))
        write_tar(root / f"train/recording.{shard:06d}.tar", members)
    return root


def write_speech_tars(root: Path) -> Path:
    """As Emilia: MP3 with the text in JSON."""
    members: list[tuple[str, bytes | str]] = []
    for number, text in enumerate(TEXTS):
        name = f"EN_B00000_S0000{number}_W000000"
        facts = {"id": name, "wav": "x.mp3", "text": f" {text}", "duration": 0.3, "dnsmos": 3.2}
        members.append((f"{name}.mp3", audio(number, fmt="MP3")))
        members.append(
            (f"{name}.json", json.dumps({**facts, "speaker": "EN_S1", "language": "en"}))
        )
    write_tar(root / "EN-B000000.tar", members)
    return root


def write_image_tars(root: Path) -> Path:
    """Captions after all images, with suffixes in capitals."""
    images = [(f"IMG_{number}.PNG", image(number)) for number in range(NUM_SAMPLES)]
    texts = [(f"IMG_{number}.TXT", text) for number, text in enumerate(TEXTS)]
    write_tar(root / "train/0.tar", [*images, *texts])
    return root


def write_text_tars(root: Path) -> Path:
    write_tar(root / "0.tar", [(f"{n}.json", json.dumps({"text": t})) for n, t in enumerate(TEXTS)])
    return root


_TABLES = ("csv", "tsv", "jsonl")
_AUDIO_CLIPS: dict[str, Callable[[Path], Path]] = {
    "aishell": write_aishell,
    "arctic": write_arctic,
    "commonvoice": write_commonvoice,
    "gigaspeech": write_gigaspeech,
    "kaldi": write_kaldi,
    "lhotse": write_lhotse,
    "librispeech": write_librispeech,
    "libritts": write_libritts,
    "ljspeech": lambda root: write_ljspeech(root, TEXTS),
    "mls": write_mls,
    "nemo": write_nemo,
    "parquet": write_speech_parquet,
    "shar": write_shar,
    "vctk": write_vctk,
    "webdataset": write_speech_tars,
    **{s: lambda root, s=s: write_table(root, s, _speech_rows(root)) for s in _TABLES},
}
LAYOUTS: dict[Task, dict[str, Callable[[Path], Path]]] = {
    "image-caption": {
        "cc3m": write_cc3m,
        "coco": write_coco,
        "flickr30k": write_flickr30k,
        "folder": write_image_folder,
        "img2dataset": write_img2dataset,
        "parquet": write_image_parquet,
        "webdataset": write_image_tars,
        **{s: lambda root, s=s: write_table(root, s, _image_rows(root)) for s in _TABLES},
    },
    "speech": _AUDIO_CLIPS,
    "tts": _AUDIO_CLIPS,
    "text": {
        "parquet": lambda root: write_parquet(root / "a.parquet", [{"text": t} for t in TEXTS]),
        "webdataset": write_text_tars,
        "txt": lambda root: write_file(root / "a.txt", "\n".join(TEXTS)),
        **{
            s: lambda root, s=s: write_table(root, s, [{"text": t} for t in TEXTS]) for s in _TABLES
        },
    },
    "sft": {
        "alpaca": write_alpaca,
        "jsonl": write_messages,
        "llava": write_llava,
        "openai": write_openai,
        "parquet": write_chat_parquet,
        "sharegpt": write_sharegpt,
        "swift": write_swift,
    },
}
