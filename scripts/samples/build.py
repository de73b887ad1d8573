"""Create the folder `samples/` from the full corpora. Its output is committed.

    python -m scripts.samples.build --corpora DIR --out samples

Requires the Debian packages unicode-data (categories of emoji) and flite (synthetic voices). Images, texts,
and WAV files are unchanged. Subsets are selected by the hash of their ids, so they are reproducible. FLAC
files keep the upper 11 of 16 bits (54 dB signal-to-noise ratio).
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import soundfile

from data_prep.corpus import transcript_group
from muomni.data.shards.manifest import hash64

_SPEAKER = "7001"
_EMOJI_PRESENTATION = "FE0F"
_OTHER_EMOJI = "other"
# The source is 64 kbit/s speech, so its lowest bits are noise, which would fill half of a FLAC file.
_FLAC_STEP = 32
_LJSPEECH_CLIP_S, _LJSPEECH_SHARE = 3.5, 0.08
# Images dominate conversations, and three conversations about each would dominate training.
_ASK_NAME_SHARE = _ASK_KIND_SHARE = 1 / 3
_ASK_KIND = ("What kind of thing is it?", "What sort of thing is this?")
_VOICES = ("slt", "rms", "awb")
_NUM_SYNTHETIC = 56
_QUESTIONS = (
    "What is this?",
    "What do you see in this picture?",
    "What does the picture show?",
    "Please describe the image.",
    "Name the thing in this picture.",
    "Can you tell me what it is?",
)
_SPEAK = ("Say: {}", "Read this aloud: {}", "Speak this text: {}")
# For texts and audio clips: repeating one is half of converting it to the other.
_REPEAT = ("Repeat: {}", "Write this down: {}", "Copy this: {}")
_NUM_REPEATED, _MAX_REPEATED_CHARS = 3000, 40
T = TypeVar("T")
Conversation = dict[str, object]


@dataclass(frozen=True)
class Image:
    """What an image shows: its name and, if Unicode lists it, its category."""

    name: str
    kind: str | None


def main() -> None:
    """Create all parts of the samples folder."""
    parser = argparse.ArgumentParser(description="Create samples/ from the full corpora.")
    parser.add_argument("--corpora", required=True, type=Path, help="folder of the full corpora")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--unicode-data",
        default="/usr/share",
        type=Path,
        help="folder where the package unicode-data is installed (default: %(default)s)",
    )
    arguments = parser.parse_args()
    corpora, out = arguments.corpora, arguments.out
    kinds = read_emoji_kinds(arguments.unicode_data / "unicode/emoji/emoji-test.txt")
    images = copy_images(corpora / "coco_emoji", out / "coco_emoji", kinds)
    clips = read_clips(corpora / "ljspeech_allison")
    shared = write_ljspeech(corpora / "ljspeech_allison", out / "ljspeech_allison", clips)
    paths = write_librispeech(corpora / "ljspeech_allison", out, clips, shared)
    triples, questions = copy_trimodal(corpora, out, clips, paths)
    (out / "text").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(corpora / "text/wordnet_examples.txt", out / "text/wordnet_examples.txt")
    lines = (out / "text/wordnet_examples.txt").read_text(encoding="utf-8").splitlines()
    conversations = [
        *image_conversations(images, questions),
        *speech_conversations(clips, paths, triples),
        *text_conversations(lines),
    ]
    (out / "llava").mkdir(parents=True, exist_ok=True)
    entries = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in conversations)
    (out / "llava/conversations.json").write_text(f"[\n{entries}\n]\n", encoding="utf-8")
    copy_licenses(corpora / "LICENSES", out / "LICENSES")
    license = arguments.unicode_data / "doc/unicode-data/copyright"
    _copy(license, out / "LICENSES/unicode-data.copyright")


def copy_images(source: Path, target: Path, kinds: dict[str, str]) -> dict[str, Image]:
    """Copy all images and English captions; returns what each image path shows."""
    images: dict[str, Image] = {}
    for subset in ("train2017", "val2017"):
        (target / subset).mkdir(parents=True, exist_ok=True)
        (target / "annotations").mkdir(exist_ok=True)
        annotation = f"captions_{subset}.json"
        content = json.loads((source / "annotations" / annotation).read_text(encoding="utf-8"))
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
        (target / "annotations" / annotation).write_text(text + "\n", encoding="utf-8")
        first: dict[int, str] = {}
        for entry in content["annotations"]:
            first.setdefault(entry["image_id"], entry["caption"])
        for image in sorted(content["images"], key=lambda image: image["file_name"]):
            name = image["file_name"]
            shutil.copyfile(source / subset / name, target / subset / name)
            # "emoji_1f469_200d_1f52c (U+1F469 U+200D U+1F52C)"
            points = image["source_file"].partition(" ")[0].split("_")[1:]
            image = Image(first[image["id"]], kinds.get(emoji_key(points)))
            images[f"coco_emoji/{subset}/{name}"] = image
    return images


def read_clips(source: Path) -> dict[str, str]:
    """Ids and texts of all clips."""
    lines = (source / "metadata.csv").read_text(encoding="utf-8").splitlines()
    return {name: text for name, _, text in (line.split("|") for line in lines)}


def write_librispeech(
    source: Path, out: Path, clips: dict[str, str], shared: set[str]
) -> dict[str, str]:
    """Write all clips as 11-bit FLAC in the layout of LibriSpeech; returns paths by clip id.

    train-clean-100 has the clips that are also in the LJSpeech folder, train-clean-360 the others, so both can
    be read without duplicates. The hundreds of a clip's number determine its chapter.
    """
    root = out / "librispeech_allison/LibriSpeech"
    paths = {}
    lines: dict[Path, list[str]] = {}
    num_seconds = 0.0
    for name, text in sorted(clips.items()):
        number = int(name.partition("-")[2])
        chapter = f"{10 + number // 100}" if name in shared else f"{20 + number // 100}"
        subset = "train-clean-100" if name in shared else "train-clean-360"
        folder = root / subset / _SPEAKER / chapter
        folder.mkdir(parents=True, exist_ok=True)
        utterance = f"{_SPEAKER}-{chapter}-{number:04d}"
        wav = source / "wavs" / f"{name}.wav"
        _write_coarse(wav, folder / f"{utterance}.flac")
        num_seconds += soundfile.info(wav).duration
        words = transcript_group(text).partition(":")[2].upper()
        transcript = folder / f"{_SPEAKER}-{chapter}.trans.txt"
        lines.setdefault(transcript, []).append(f"{utterance} {words}\n")
        paths[name] = str((folder / f"{utterance}.flac").relative_to(out))
    for transcript, entries in lines.items():
        transcript.write_text("".join(entries), encoding="utf-8")
    table = ";ID  |SEX| SUBSET           |MINUTES| NAME\n"
    table += f"{_SPEAKER} | F | train-clean-460  | {num_seconds / 60:.2f} | Allison Smith\n"
    (root / "SPEAKERS.TXT").write_text(table, encoding="utf-8")
    return paths


def write_ljspeech(source: Path, target: Path, clips: dict[str, str]) -> set[str]:
    """Copy a subset of the short clips with their lines of metadata.csv; returns their ids."""
    copied = set()
    (target / "wavs").mkdir(parents=True, exist_ok=True)
    lines = []
    for line in (source / "metadata.csv").read_text(encoding="utf-8").splitlines():
        name = line.partition("|")[0]
        wav = source / "wavs" / f"{name}.wav"
        if name not in clips or soundfile.info(wav).duration > _LJSPEECH_CLIP_S:
            continue
        if _fraction(f"ljspeech {name}") < _LJSPEECH_SHARE:
            lines.append(line + "\n")
            copied.add(name)
            shutil.copyfile(wav, target / "wavs" / wav.name)
    (target / "metadata.csv").write_text("".join(lines), encoding="utf-8")
    return copied


def copy_trimodal(
    corpora: Path, out: Path, clips: dict[str, str], paths: dict[str, str]
) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Copy the items about emoji, spoken by Allison (as references to her clips) or by flite.

    Also writes the synthetic audio clips as a table of speech. Returns triples and questions, with paths
    relative to `out`/trimodal.
    """
    (out / "trimodal").mkdir(parents=True, exist_ok=True)
    by_text = {text.lower(): paths[name] for name, text in clips.items()}
    rows = _jsonl(corpora / "trimodal/manifest.jsonl")
    emoji = [row for row in rows if "coco_emoji" in row["image"] and row["lang"] == "en"]
    synthetic = sorted(
        (row for row in emoji if row["kind"] == "synthetic"), key=lambda row: hash64(row["id"])
    )[:_NUM_SYNTHETIC]
    human = [row for row in emoji if row["speaker"] == "allison"]
    kept = []
    for row in sorted([*human, *synthetic], key=lambda row: row["id"]):
        if row["speaker"] == "allison":
            row["audio"] = f"../{by_text[row['transcript'].lower()]}"
        else:
            _write_coarse(corpora / "trimodal" / row["audio"], out / "trimodal" / row["audio"])
        kept.append(row)
    questions = _jsonl(corpora / "trimodal/questions.jsonl")
    for row in questions:
        row["asks"] = "name"
        _write_coarse(corpora / "trimodal" / row["audio"], out / "trimodal" / row["audio"])
    questions += speak_questions(out / "trimodal")
    _write_jsonl(out / "trimodal/manifest.jsonl", kept)
    _write_jsonl(out / "trimodal/questions.jsonl", questions)
    spoken = [row for row in kept if row["kind"] == "synthetic"] + questions
    _write_jsonl(
        out / "trimodal/synthetic_speech.jsonl",
        [
            {
                "id": Path(row["audio"]).stem,
                "audio": row["audio"],
                "text": transcript_group(row["transcript"]).partition(":")[2],
                "speaker": row["speaker"],
            }
            for row in spoken
        ],
    )
    return kept, questions


def speak_questions(target: Path) -> list[dict[str, str]]:
    """Synthesize questions about the category into `target`/questions; returns their rows."""
    rows = []
    for number, text in enumerate(_ASK_KIND):
        for voice in _VOICES:
            audio = f"questions/kind{number}_{voice}.flac"
            with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
                subprocess.run(["flite", "-voice", voice, "-t", text, "-o", wav.name], check=True)
                _write_coarse(Path(wav.name), target / audio)
            speaker = {"speaker": f"flite-{voice}", "kind": "synthetic"}
            rows.append({"audio": audio, "transcript": text, **speaker, "asks": "kind"})
    return rows


def image_conversations(
    images: dict[str, Image], questions: list[dict[str, str]]
) -> Iterator[Conversation]:
    """A written question about each image, and for some a spoken question about its name or category."""
    by_name = [row for row in questions if row["asks"] == "name"]
    by_kind = [row for row in questions if row["asks"] == "kind"]
    for path, image in sorted(images.items()):
        stem = Path(path).stem
        question = _pick(_QUESTIONS, stem)
        yield _conversation(f"caption-{stem}", f"<image>\n{question}", image.name, image=path)
        chance = _fraction(f"ask {stem}")
        if chance < _ASK_NAME_SHARE:
            asked, answer = _pick(by_name, stem), image.name
        elif chance < _ASK_NAME_SHARE + _ASK_KIND_SHARE and image.kind is not None:
            asked, answer = _pick(by_kind, stem), image.kind
        else:
            continue
        spoken = f"trimodal/{asked['audio']}"
        yield _conversation(f"ask-{stem}", "<image>\n<audio>", answer, image=path, audio=spoken)


def speech_conversations(
    clips: dict[str, str], paths: dict[str, str], triples: list[dict[str, str]]
) -> Iterator[Conversation]:
    """Transcribe each audio clip, with several prompts; speak each text."""
    audio_clips = [(paths[name], text, name) for name, text in sorted(clips.items())]
    audio_clips += [
        (f"trimodal/{row['audio']}", row["transcript"], row["id"])
        for row in triples
        if row["kind"] == "synthetic"
    ]
    for path, text, name in audio_clips:
        group = transcript_group(text)
        for number, question in enumerate(_REPEAT):
            prompt, key = question.format("<audio>"), f"transcribe-{name}-{number}"
            yield _conversation(key, prompt, text, audio=path, group=group)
    for name, text in sorted(clips.items()):
        prompt = _pick(_SPEAK, name).format(text)
        entry = _conversation(f"speak-{name}", prompt, text, group=transcript_group(text))
        turns = entry["conversations"]
        assert isinstance(turns, list)
        turns[1]["audio"] = paths[name]
        yield entry


def text_conversations(lines: list[str]) -> Iterator[Conversation]:
    """Repeat a text, a part of both reading aloud and transcribing."""
    short = sorted({line for line in lines if len(line) <= _MAX_REPEATED_CHARS}, key=hash64)
    for number, text in enumerate(short[:_NUM_REPEATED]):
        prompt = _pick(_REPEAT, text).format(text)
        yield _conversation(f"repeat-{number:04d}", prompt, text, group=transcript_group(text))


def read_emoji_kinds(path: Path) -> dict[str, str]:
    """Category ("animal", "person", "sky & weather") by code points ("1F469 200D 1F52C").

    Reads emoji-test.txt of UTS #51. The category is the part of the subgroup before the hyphen
    ("animal-bird"). Emoji that the list calls "other" are skipped, and keys omit presentation selectors.

    Raises:
        ValueError: the file lists no emoji.
    """
    kinds: dict[str, str] = {}
    kind = _OTHER_EMOJI
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# subgroup:"):
            kind = line.partition(":")[2].strip().partition("-")[0]
        points = line.partition("#")[0].partition(";")[0].split()
        if points and kind != _OTHER_EMOJI:
            kinds[emoji_key(points)] = kind
    if not kinds:
        raise ValueError(f"{path} lists no emoji, so it is not emoji-test.txt of Unicode")
    return kinds


def emoji_key(points: list[str]) -> str:
    """Hexadecimal code points in the form of the keys of `read_emoji_kinds`."""
    return " ".join(
        point.upper().zfill(4) for point in points if point.upper() != _EMOJI_PRESENTATION
    )


def copy_licenses(source: Path, target: Path) -> None:
    """Copy the licenses of the packages that the samples come from."""
    for name in (
        "asterisk-core-sounds-en-g722",
        "fonts-noto-color-emoji",
        "unicode-cldr-core",
        "wordnet-base",
        "flite",
    ):
        _copy(source / f"{name}.copyright", target / f"{name}.copyright")


def _conversation(name: str, prompt: str, answer: str, **fields: str) -> Conversation:
    turns = [{"from": "human", "value": prompt}, {"from": "gpt", "value": answer}]
    return {"id": name, **fields, "conversations": turns}


def _fraction(name: str) -> float:
    return hash64(name) / 2**64


def _pick(choices: Sequence[T], name: str) -> T:
    return choices[hash64(name) % len(choices)]


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _write_coarse(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    samples, rate = soundfile.read(source, dtype="int16")
    coarse = (samples // _FLAC_STEP * _FLAC_STEP).astype("int16")
    soundfile.write(target, coarse, rate, compression_level=1.0)


def _jsonl(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _write_jsonl(path: Path, rows: Iterable[dict[str, str]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
