"""Open a case: which files are its sequences and which its mask, by the names that cohorts use.

A pattern names a file, with or without its suffix, below the folder of its case; capitals do not
matter in the name. `{root}` is the folder that holds the cases, `{case}` the path of the case's
folder below it and `{name}` the last part of that path.
"""

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from .formats import (
    OTHER_MASK,
    absolute,
    check_format,
    check_not_only_masks,
    is_scan,
    mask_of,
    mask_words,
    scan_name,
    volumes_in,
)
from .labels import Labels
from .scans import Scan, with_doubts
from .sequences import OF_SEVERAL, SEQUENCES, contradiction, plain, says_other
from .slices import SLICE_NAME, Case, errors_name, find_slices
from .studies import Study, find_studies, sort_study

Patterns = tuple[str, ...]  # the first that matches any file is used


class Sequences(NamedTuple):
    """The files of a case; None for those that are missing."""

    flair: Path
    pre: Path | None
    post: Path | None
    mask: Path | None


@dataclass(frozen=True)
class Layout:
    """The patterns of each sequence and of the mask; what they do not find is missing."""

    name: str
    flair: Patterns
    pre: Patterns = ()
    post: Patterns = ()
    mask: Patterns = ()
    of_user: bool = False

    def files(self, folder: Path, root: Path) -> dict[str, list[Path]]:
        """Find a case's matching files by sequence, each once; the narrower patterns come first."""
        files: dict[str, list[Path]] = {}
        taken: set[Path] = set()
        for role in ("mask", "post", "flair", "pre"):
            files[role] = []
            for pattern in getattr(self, role):
                for path in _fitting(pattern, folder, root):
                    is_other = role == "mask" and not self.of_user and OTHER_MASK.search(path.name)
                    if path not in taken and not is_other:
                        files[role].append(path)
                if files[role]:
                    break
            taken.update(files[role])
        return files

    def fits(self, folder: Path, root: Path) -> bool:
        """Tell whether a folder holds a sequence of a case."""
        files = self.files(folder, root)
        return any(files[role] for role in ("flair", "pre", "post"))

    def one_of_each(self, folder: Path, matching: dict[str, list[Path]]) -> Sequences:
        """Return the one match of each pattern; ValueError if there are two, or none of FLAIR."""
        files: dict[str, Path | None] = {}
        for role in ROLES:
            paths, patterns = matching[role], getattr(self, role)
            shown = f"{role}={patterns[0]}" if patterns else role
            if not paths and role == "flair":
                remedy = "change --sequences" if self.of_user else "name it with --sequences"
                raise ValueError(f"{folder}: no file matches {shown} ({self.name}); {remedy}")
            if len(paths) > 1:
                first, second = _below(paths[0], folder), _below(paths[1], folder)
                raise ValueError(
                    f"{folder}: {first} and {second} both match {shown} ({self.name}); choose one "
                    "with --sequences"
                )
            files[role] = paths[0] if paths else None
        assert files["flair"] is not None
        return Sequences(files["flair"], files["pre"], files["post"], files["mask"])


# Of lesion masks in BIDS derivatives; OTHER_MASK rules out brain and tissues. *_mask may be of any.
LESION_MASKS = []
for name in ("*lesion*", "*tumo*r*", "*_roi"):
    for place in ("*/{case}/anat", "*/{case}", "{case}/anat", "{case}"):
        LESION_MASKS.append(f"{{root}}/derivatives/{place}/{name}")

# fmt: off
BIDS = Layout("BIDS", ("anat/*_FLAIR",), ("anat/*_T1w",), ("anat/*_ce-*_T1w",),
              tuple(LESION_MASKS))
LAYOUTS = (
    #      cohort            FLAIR          pre-contrast  post-contrast  mask
    Layout("BraTS 2023",     ("*-t2f",),    ("*-t1n",),   ("*-t1c",),    ("*-seg",)),
    Layout("BraTS to 2021",  ("*_flair",),  ("*_t1",),    ("*_t1ce",),   ("*_seg",)),
    Layout("UCSF-PDGM",      ("*_FLAIR",),  ("*_T1",),    ("*_T1c",),    ("*_tumor_segmentation",)),
    Layout("UPENN-GBM",      ("*_FLAIR",),  ("*_T1",),    ("*_T1GD",),
           ("*_segm", "{root}/../images_segm/{name}_segm")),
    Layout("plain names",    ("flair",),     ("t1", "t1w", "t1n", "pre", "t1_pre", "t1pre"),
           ("t1ce", "t1c", "t1gd", "post", "t1_post", "t1post", "ce-t1", "t1-ce"),
           ("mask", "seg", "lesion", "segmentation", "label")),
)
# fmt: on
ROLES = ("flair", "pre", "post", "mask")


def parse_sequences(texts: Sequence[str] | None) -> Layout | None:
    """Return the layout that the texts of --sequences describe; ValueError if they are bad."""
    if texts is None:
        return None
    patterns = {}
    for text in texts:
        role, _, pattern = text.partition("=")
        if role not in ROLES or not pattern or role in patterns:
            raise ValueError(
                f"--sequences {text}: give each of {', '.join(ROLES)} at most once, as in "
                "flair='*_flair.nii.gz'"
            )
        patterns[role] = (pattern,)
    if "flair" not in patterns:
        raise ValueError("--sequences: flair is missing; it is the sequence the lesion is seen on")
    return Layout("--sequences", **patterns, of_user=True)


def sequences_in(folder: Path, root: Path) -> Sequences | None:
    """Find a case's files by the layout in LAYOUTS that finds the most; None without FLAIR."""
    matching = [layout.files(folder, root) for layout in LAYOUTS]
    counts = [sum(map(bool, files.values())) for files in matching]
    most = counts.index(max(counts))
    if not matching[most]["flair"]:
        return None
    return LAYOUTS[most].one_of_each(folder, matching[most])


def _fitting(pattern: str, folder: Path, root: Path) -> list[Path]:
    """List the volume files and DICOM folders that match a pattern, in order."""
    places = {"root": absolute(root), "case": folder.relative_to(root), "name": folder.name}
    for name, place in places.items():
        pattern = pattern.replace(f"{{{name}}}", glob.escape(str(place)))
    where, _, wanted = pattern.rpartition("/")
    wanted = wanted.lower()
    fitting = []
    directories = glob.glob(str(Path(glob.escape(str(folder)), where)))
    for directory in filter(Path.is_dir, map(Path, sorted(directories))):
        for path in sorted(directory.iterdir()):
            fits = fnmatch(path.name.lower(), wanted) or fnmatch(scan_name(path).lower(), wanted)
            if fits and path.name[0] != "." and is_scan(path):
                fitting.append(path)
    return fitting


def _below(path: Path, folder: Path) -> Path:
    return path.relative_to(folder) if path.is_relative_to(folder) else path


# Cases


@dataclass(frozen=True)
class Source:
    """A case that has not been read yet: `folder` (or file) holds it, and `opener` opens it."""

    name: str
    folder: Path
    opener: Callable[[], Case] = field(compare=False, repr=False)
    patient_id: str = ""  # of the DICOM headers; empty if they name nobody
    labels: Labels = field(default_factory=Labels, compare=False, repr=False)
    patient: str = field(default="", compare=False)  # as in Case
    subset: str = field(default="", compare=False)
    picked: tuple[int, ...] = ()  # as in Case
    given_spacing: tuple[float, float, float] | None = None  # as in Case

    def open(self) -> Case:
        """Open the case without reading voxels; ValueError, naming the file, if it is unusable."""
        with errors_name(self.folder):
            case = self.opener()
        if self.given_spacing and isinstance(case, Scan):
            raise ValueError(f"{self.folder}: states its voxel spacing itself; leave out --spacing")
        return replace(
            case,
            given_spacing=self.given_spacing,
            name=self.name,
            labels=self.labels,
            patient=self.patient,
            subset=self.subset,
            picked=self.picked,
        )


def check_apart(
    folder: Path, option: str, sources: Sequence[Source], images: Path | None = None
) -> None:
    """Raise ValueError if a folder that is written to is a case, or may be taken for one.

    That may be so of every folder in `images`, if given, but not in derivatives (BIDS).
    """
    if images and folder.resolve().is_relative_to(images.resolve()):
        if "derivatives" not in folder.resolve().relative_to(images.resolve()).parts:
            raise ValueError(f"{folder}: lies among the cases; name another place with {option}")
    for source in sources:
        if source.folder.resolve() == folder.resolve():
            raise ValueError(f"{folder}: is a source; name another place with {option}")


def check_file_apart(path: Path, option: str, sources: Sequence[Source], images: Path) -> None:
    """Raise ValueError if a file that is written would lie in a case, or in what is taken for one.

    Beside the folders of the cases, in `images` itself, it does no harm.
    """
    folder = path.parent
    is_beside = folder.resolve() == images.resolve()
    check_apart(folder, option, sources, None if is_beside else images)


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
    mask = mask_of(path)
    return with_doubts(Scan.open(name, [pre, flair, post], mask))


def _in_layout(folder: Path, files: Sequences, layout: Layout | None = None) -> Scan:
    """Open the scan whose sequences a layout has found, and whose mask it may leave out."""
    mask, note = files.mask, ""
    if mask is None and not (layout and layout.of_user and layout.mask):
        mask = mask_of(files.flair)
    if not layout:
        unused = []
        for path in volumes_in(folder):
            name = scan_name(path)
            if path not in files and not says_other(name) and not mask_words(name):
                unused.append(path.name)
        if unused:
            names = ", ".join(unused)
            note = (
                f"not used, as their names do not say what they are: {names}; name each sequence "
                "with --sequences"
            )
    return with_doubts(Scan.open(folder.name, [files.pre, files.flair, files.post], mask, note))


def open_study(study: Study) -> Scan:
    """Open a DICOM study; its mask is <case>_mask, beside its folder or in it, or <FLAIR>_mask."""
    series, choice = sort_study(study)
    places = study.folder.with_name(study.name), study.folder / study.name, series["FLAIR"].path
    masks = list(filter(None, map(mask_of, places)))
    return Scan.open(
        study.name, list(map(series.get, SEQUENCES)), masks[0] if masks else None, choice
    )


def _find_scan(path: Path) -> Scan:
    """Open the scan in one file; ValueError if it has one channel and another name than FLAIR.

    If it has three, and the name of images that often have several, they are doubtful.
    """
    scan = Scan.open(scan_name(path), [path], mask_of(path))
    wrong = contradiction("FLAIR", scan.name) or mask_words(scan.name)
    if scan.channels == 1 and wrong:
        raise ValueError(
            f"{path}: its one channel would be used as FLAIR, but its name says {wrong!r}; name "
            "the sequences with --flair, --pre and --post"
        )
    other = OF_SEVERAL.search(plain(scan.name))
    if scan.channels == 3 and other:
        doubt = f"its name says {other[0]!r}: are its volumes pre-contrast, FLAIR, post-contrast?"
        return replace(scan, doubts=(doubt,))
    return scan
