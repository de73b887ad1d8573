"""Tiny corpora of speech, in the layout of each format; every writer returns the value of --src."""

import json
from pathlib import Path

from tests.data_prep.corpus_files import (
    NUM_SAMPLES,
    TEXTS,
    write_audio_clips,
    write_file,
    write_jsonl,
    write_parquet,
    write_tar,
)
from tests.data_prep.raw_corpora import audio


def speech_rows(root: Path) -> list[dict]:
    return [
        {"audio": name, "text": text, "speaker": "anna"}
        for name, text in zip(write_audio_clips(root), TEXTS, strict=True)
    ]


def write_commonvoice(root: Path) -> Path:
    """The folder of one language with two clips per split."""
    names = write_audio_clips(root / "en/clips", "mp3")
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
