"""Open the case in a folder or file: which files are its sequences, and which its mask."""

from dataclasses import replace
from pathlib import Path

from .cohorts import Layout, Sequences, absolute, sequences_in
from .dicom import Series
from .formats import check_format, is_scan, scan_name
from .scans import Scan
from .sequences import SEQUENCES, contradiction
from .slices import SLICE_NAME, Case, find_slices
from .studies import Study, find_studies, sort_study
from .truth import check_not_only_masks, mask_of, mask_words, volumes_in


class SeveralStudies(ValueError):
    """A folder that should hold one case holds several DICOM studies."""


def is_one_case(folder: Path) -> bool:
    """Tell whether the volume files of a folder are one FLAIR and its other sequences."""
    try:
        files = sequences_in(folder, folder.parent)
    except ValueError:  # two of a kind: the files of several cases
        return False
    return files is not None and (files.pre or files.post) is not None


def holds_slices(folder: Path) -> bool:
    return any(SLICE_NAME.match(path.name) for path in folder.iterdir())


def holds_case(folder: Path) -> bool:
    return holds_slices(folder) or bool(volumes_in(folder))


def find_case(path: Path, root: Path | None = None, layout: Layout | None = None) -> Case:
    """Open the case in a folder or volume file; ValueError, naming the file, if it is unusable."""
    root = root or path.parent
    if layout:
        files = layout.one_of_each(path, layout.files(path, root))
        return _in_layout(path, files, layout)
    if not path.is_dir():
        return _find_scan(path)
    volumes = volumes_in(path)
    if volumes and is_scan(path):
        raise ValueError(f"{path}: holds DICOM files and {volumes[0].name}; move one of them away")
    if volumes and holds_slices(path):
        raise ValueError(f"{path}: holds slices and {volumes[0].name}; move one of them away")
    if not volumes:
        studies = find_studies(absolute(path))
        if len(studies) > 1:
            names = " and ".join(study.name for study in studies)
            raise SeveralStudies(f"{path}: holds the DICOM studies {names}; give the folder of one")
        if studies:
            return open_study(replace(studies[0], name=path.name, folder=path))
        if not holds_slices(path):
            check_format(path)
            check_not_only_masks(path)
        return find_slices(path)
    if len(volumes) == 1:
        return replace(_find_scan(volumes[0]), name=path.name)
    files = sequences_in(path, root)
    if files:
        return _in_layout(path, files)
    raise ValueError(
        f"{path}: holds {volumes[0].name} and {volumes[1].name}; name its sequences with "
        "--sequences, or with --flair, --pre and --post, or give each case one file of three "
        "channels"
    )


def find_sequences(flair: Path, pre: Path | None, post: Path | None) -> Scan:
    """Open the scan with one file per sequence, named after FLAIR and its folder."""
    path = absolute(flair)
    name = f"{path.parent.name}_{scan_name(path)}"
    return _with_doubts(Scan.open(name, [pre, flair, post], mask_of(path)))


def _in_layout(folder: Path, files: Sequences, layout: Layout | None = None) -> Scan:
    """Open the scan whose sequences a layout has found, and whose mask it may leave out."""
    mask = files.mask
    if mask is None and not (layout and layout.of_user and layout.mask):
        mask = mask_of(files.flair)
    return _with_doubts(Scan.open(folder.name, [files.pre, files.flair, files.post], mask))


def _with_doubts(scan: Scan) -> Scan:
    """Doubt the sequences that are another one by their name, or by their DICOM header."""
    doubts = []
    for role, file in zip(SEQUENCES, scan.slices, strict=True):
        if role != "FLAIR" and file == scan.flair:
            continue
        words = file.words if isinstance(file, Series) else scan_name(file)
        wrong = contradiction(role, words)
        if wrong:
            doubts.append(f"{role} is {file.name}, which says {wrong!r}: check the order")
        elif role == "FLAIR" and isinstance(file, Series) and not file.may_be_flair:
            doubts.append(f"{role} is {file.summary(file.path)}, which may be another sequence")
    return replace(scan, doubts=tuple(doubts))


def open_study(study: Study) -> Scan:
    """Open a DICOM study; its mask is <case>_mask, beside its folder or in it, or <FLAIR>_mask."""
    series, choice = sort_study(study)
    places = study.folder.with_name(study.name), study.folder / study.name, series["FLAIR"].path
    masks = list(filter(None, map(mask_of, places)))
    return Scan.open(
        study.name, list(map(series.get, SEQUENCES)), masks[0] if masks else None, choice
    )


def _find_scan(path: Path) -> Scan:
    """Open the scan in one file; ValueError if it has one channel and another name than FLAIR."""
    scan = Scan.open(scan_name(path), [path], mask_of(path))
    wrong = contradiction("FLAIR", scan.name) or mask_words(scan.name)
    if scan.channels == 1 and wrong:
        raise ValueError(
            f"{path}: its one channel would be used as FLAIR, but its name says {wrong!r}; name "
            "the sequences with --flair, --pre and --post"
        )
    return scan
