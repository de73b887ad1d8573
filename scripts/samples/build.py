"""Create the folder `samples/`. Its output is committed.

    python -m scripts.samples.build --corpora DIR --npm node_modules --out samples

Requires the Debian packages dataset-fashion-mnist, flite, festival, festvox-kdlpc16k, festvox-us-slt-hts,
espeak-ng, and opus-tools; the npm packages in `images.STYLES` (of @iconify-json); and the PyPI packages
scikit-learn and resvg-py. DIR has the speech `ljspeech_allison` and the sentences
`text/wordnet_examples.txt`. Subsets are selected by hashes, so they are reproducible.
"""

import argparse
import io
import json
import shutil
import tarfile
import tempfile
from pathlib import Path

from scripts.samples.conversations import write_conversations
from scripts.samples.images import SPLITS, STYLES, build_images
from scripts.samples.speech import build_speech
from scripts.samples.text import write_text

# Each is an archive, since ten thousand small files would take 40 MB on disk.
ARCHIVES = ("images", "speech", "conversations", "text")
_PACKAGES = (
    "dataset-fashion-mnist", "espeak-ng", "festival", "festvox-kdlpc16k", "festvox-us-slt-hts", "flite",
)  # fmt: skip
_CORPORA_PACKAGES = ("asterisk-core-sounds-en-g722", "wordnet-base")


def main() -> None:
    """Create all archives of the samples folder."""
    parser = argparse.ArgumentParser(description="Create samples/ from its sources.")
    parser.add_argument("--corpora", required=True, type=Path, help="folder of the full corpora")
    parser.add_argument("--npm", required=True, type=Path, help="folder node_modules")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--fashion-mnist",
        default="/usr/share/datasets/fashion-mnist",
        type=Path,
        help="folder of the package dataset-fashion-mnist (default: %(default)s)",
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder), arguments.corpora, arguments.npm, arguments.fashion_mnist)
        for name in ARCHIVES:
            pack(Path(folder) / name, arguments.out / f"{name}.tar.xz")
    copy_licenses(arguments.out / "LICENSES", arguments.corpora, arguments.npm)


def build(out: Path, corpora: Path, npm: Path, fashion: Path) -> None:
    """Write all corpora in `out`."""
    images = build_images(out, fashion, npm)
    clips = build_speech(out, corpora / "ljspeech_allison")
    write_text(out / "text", corpora / "text/wordnet_examples.txt")
    (out / "conversations").mkdir()
    conversations = [
        entry for split in SPLITS for entry in write_conversations(split, images, clips)
    ]
    entries = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in conversations)
    path = out / "conversations/conversations.json"
    path.write_text(f"[\n{entries}\n]\n", encoding="utf-8")


def pack(folder: Path, archive: Path) -> None:
    """Pack a folder; the archive depends on the files' names and contents only."""
    with tarfile.open(archive, "w:xz", preset=9, format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            data = path.read_bytes()
            member = tarfile.TarInfo(path.relative_to(folder.parent).as_posix())
            member.size, member.mode = len(data), 0o644
            tar.addfile(member, io.BytesIO(data))


def copy_licenses(folder: Path, corpora: Path, npm: Path) -> None:
    """Copy the licenses of the Debian packages; name author and license of the emoji styles."""
    folder.mkdir(exist_ok=True)
    for package in _PACKAGES:
        source = Path("/usr/share/doc") / package / "copyright"
        shutil.copyfile(source, folder / f"{package}.copyright")
    for package in _CORPORA_PACKAGES:
        name = f"{package}.copyright"
        shutil.copyfile(corpora / "LICENSES" / name, folder / name)
    for style in STYLES:
        info = json.loads((npm / f"@iconify-json/{style}/info.json").read_text(encoding="utf-8"))
        author, license = info["author"], info["license"]
        text = f"{info['name']}, {author['name']} ({author['url']})\n"
        text += f"License: {license['title']} ({license['spdx']}), {license['url']}\n"
        text += "Changes: rendered from SVG at 64 x 64 pixels, on white, with 48 colors\n"
        (folder / f"{style}.copyright").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
