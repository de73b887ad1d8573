"""The annotation files of a COCO corpus, and the folder of images of each."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from data_prep.corpus import MISSING_MEDIA, BadSampleError, require_folder
from data_prep.options import ReaderOptions
from data_prep.readers.media_paths import find_media
from data_prep.readers.walk import IMAGE_SUFFIXES, MediaFiles
from muomni.errors import DataError

_PREFIX = "captions_"


@dataclass(frozen=True)
class AnnotationFile:
    """An annotation file, its subset (such as train2017), and the folder that has its images.

    `is_searched` is whether the images are anywhere below the folder.
    """

    path: Path
    subset: str
    folder: Path
    is_searched: bool = False

    @cached_property
    def _images(self) -> MediaFiles:
        return MediaFiles(self.folder, IMAGE_SUFFIXES, self.subset)

    def image(self, name: str) -> str:
        """The path of an image by its `file_name`; raises `BadSampleError` if it is searched in vain."""
        if not self.is_searched:
            return find_media(self.folder, name, "file_name")
        found = self._images.find(name)
        if found is None:
            raise BadSampleError(MISSING_MEDIA, self._images.not_found(name))
        return str(self.folder / found)


def annotation_files(src: Path, options: ReaderOptions) -> list[AnnotationFile]:
    """The files of SRC/annotations that match `options.annotations`, or SRC if it is a file.

    Images are in the folder that an annotation file is named after, else anywhere below `--media` or the
    corpus. Without `--annotations`, only files with such a folder are read; raises `DataError` if none has.
    """
    if src.is_file():
        return [_annotation_file(src, _corpus_of(src), options)]
    folder = require_folder(src / "annotations", "COCO annotation folder")
    pattern = options.annotations or f"{_PREFIX}*.json"
    files = [_annotation_file(path, src, options) for path in sorted(folder.glob(pattern))]
    if not options.annotations:
        files = [file for file in files if file.subset == file.path.stem.removeprefix(_PREFIX)]
    if not files:
        raise DataError(
            f"no annotation file {folder}/{pattern} has a matching image folder beside 'annotations'; "
            "check --src and --annotations"
        )
    return files


def _corpus_of(annotation: Path) -> Path:
    folder = annotation.absolute().parent
    return folder.parent if folder.name == "annotations" else folder


def _annotation_file(path: Path, corpus: Path, options: ReaderOptions) -> AnnotationFile:
    """`CORPUS/train2017` has the images of captions_train2017.json and captions_train2017_fr.json."""
    base = options.media_root or corpus
    name = path.stem.removeprefix(_PREFIX)
    while name:
        if (base / name).is_dir():
            return AnnotationFile(path, name, base / name)
        name = name.rpartition("_")[0]
    return AnnotationFile(path, path.stem.removeprefix(_PREFIX), base, is_searched=True)
