"""The cases in a folder: slices as images, medical volume files, DICOM series, cohorts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ..preprocess import SEQUENCES
from .cohorts import BIDS, Layout, absolute, sequences_in
from .described import DescribedCase, described_cases
from .dicom import Series, find_images
from .formats import check_format, is_scan, scan_name
from .labels import Labels
from .scans import Scan
from .sequences import contradiction
from .slices import SLICE_NAME, Case, errors_name, find_slices
from .studies import Study, find_studies, sort_study
from .truth import check_not_only_masks, mask_of, mask_words, say_lost_masks, volumes_in


@dataclass(frozen=True)
class Source:
    """A case that has not been read yet: its name and location.

    `folder` is its folder or its volume file; `root` holds it and the other cases.
    """

    name: str
    folder: Path
    root: Path
    layout: Layout | None = None  # None: found from the files in the folder
    labels: Labels = field(default_factory=Labels, compare=False, repr=False)
    study: Study | None = field(default=None, repr=False)  # of DICOM
    patient: str = field(default="", compare=False)  # as in Case
    subset: str = field(default="", compare=False)
    picked: tuple[int, ...] = ()  # as in Case
    described: DescribedCase | None = field(default=None, repr=False)  # by a dataset.json

    @property
    def patient_id(self) -> str:
        """Return the PatientID of the DICOM headers; empty if they name nobody."""
        return self.study.patient if self.study else ""

    def open(self) -> Case:
        """Open the case without reading voxels; ValueError, naming the file, if it is unusable."""
        with errors_name(self.folder):
            if self.study:
                case = _open_study(self.study)
            elif self.described:
                files, mask = self.described.files, self.described.mask
                case = Scan.open(self.name, files, mask)
            else:
                case = find_case(self.folder, self.root, self.layout)
        return replace(
            case,
            name=self.name,
            labels=self.labels,
            patient=self.patient,
            subset=self.subset,
            picked=self.picked,
        )


def find_cases(root: Path | str, names: Sequence[str] | None = None) -> list[Case]:
    """Open every case of `list_cases`; ValueError, naming the file, if one is unusable."""
    return [source.open() for source in list_cases(root, names)]


def list_cases(
    root: Path | str,
    names: Sequence[str] | None = None,
    other_than: Path | None = None,
    layout: Layout | None = None,
    labels: Labels | None = None,
    channels: Sequence[int] | None = None,
) -> list[Source]:
    """List the cases in `root`, which holds folders and volume files or is itself a case, by name.

    With `names`, only these; never the folder `other_than`, nor one of predictions. `layout` says
    where sequences and masks are; without it, they are looked for. `channels` are those of
    pre-contrast, FLAIR and post-contrast, or of FLAIR alone, in files that hold several. Raises
    FileNotFoundError or ValueError if there is nothing to read, or two cases have the same name.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder; give the folder that holds the cases")
    if not root.is_dir() and not is_scan(root):
        check_format(root)
        raise ValueError(f"{root}: is not a volume file; give one, or the folder of its case")
    if _is_output(root) or _is_output(root.resolve().parent):
        raise ValueError(f"{root}: holds predictions (args.json); give the folder of the scans")
    picked = check_channels(channels)
    sources = _sources_in(root, other_than, layout, picked)
    if not sources:
        check_format(root)
        check_not_only_masks(root)
        raise ValueError(
            f"{root}: holds no case folder, no volume file, no DICOM image and no slice named "
            "<anything>_<number>.tif or .png; give the folder that holds the cases, or one case"
        )
    sources = [replace(source, labels=labels or Labels()) for source in sources]
    found = {}
    for source in sources:
        if any("\udc80" <= letter <= "\udcff" for letter in str(source.folder)):
            raise ValueError(f"{ascii(str(source.folder))}: its name is not UTF-8; rename it")
        if (first := found.setdefault(source.name, source)) != source:
            raise ValueError(
                f"{first.folder} and {source.folder.name} have the same case name; rename one"
            )
    if missing := sorted(set(names or ()) - found.keys()):
        raise ValueError(f"{root}: holds no case {missing[0]!r}; check the name")
    return [source for source in sources if names is None or source.name in names]


def check_channels(channels: Sequence[int] | None) -> tuple[int, ...]:
    """Return the channels to use, () for all; ValueError unless they are one or three."""
    if channels and len(channels) not in (1, len(SEQUENCES)):
        raise ValueError(
            "--channels takes the channels of pre-contrast, FLAIR and post-contrast, or of FLAIR "
            f"alone, not {len(channels)}"
        )
    return tuple(channels or ())


def _sources_in(
    root: Path, other_than: Path | None, layout: Layout | None, picked: tuple[int, ...]
) -> list[Source]:
    whole = absolute(root)
    if not root.is_dir():
        return [Source(scan_name(whole), whole, whole.parent, picked=picked)]
    if layout and not is_scan(root):
        return _by_patterns(whole, other_than, layout)
    described = described_cases(whole, picked)
    if described is not None:
        return [_described_source(case, whole) for case in described]
    if sessions := _bids_sessions(whole):
        return sessions
    if (root / "images_structural").is_dir():  # UPENN-GBM: it has other folders beside this one
        root = root / "images_structural"
    cases = _cases_in(root, other_than)
    return [replace(case, picked=picked) for case in cases]


def _described_source(case: DescribedCase, root: Path) -> Source:
    flair = case.files[len(case.files) // 2]
    assert flair is not None
    return Source(case.name, flair, root, picked=case.channels, described=case)


def _bids_sessions(root: Path) -> list[Source]:
    """List the sessions of a BIDS data set, or of one subject if `root` is its folder."""
    top, subjects = root, root.glob("sub-*")
    if root.name.startswith("sub-"):
        root = root.resolve()  # if it is a link, its masks are beside its target
        top, subjects = root.parent, [root]
    anats = [anat for each in subjects for at in ("anat", "ses-*/anat") for anat in each.glob(at)]
    folders = sorted(anat.parent for anat in anats if anat.is_dir())
    return [Source("_".join(each.relative_to(top).parts), each, top, BIDS) for each in folders]


def _by_patterns(root: Path, other_than: Path | None, layout: Layout) -> list[Source]:
    """List the folders, in `root` or one level deeper, with files that match a user's layout.

    Folders of volume files that match no pattern are listed too: opening them raises ValueError.
    Raises ValueError if nothing matches.
    """

    def fits(folder: Path) -> bool:
        files = layout.files(folder, root if folder != root else root.parent)
        return any(files[role] for role in ("flair", "pre", "post"))

    found, lacking = [], []  # opening a case reports what it lacks
    for folder in _folders_in(root, other_than):
        if fits(folder):
            found.append(folder)
        elif inner := [each for each in _folders_in(folder, other_than) if fits(each)]:
            found += inner
        elif volumes_in(folder) and not _belongs_to_mask(folder, root, layout):
            lacking.append(folder)
    if not found and fits(root):
        return [Source(root.name, root, root.parent, layout)]
    if not found:
        raise ValueError(
            f"{root}: no file in its folders matches flair={layout.flair[0]}; change --sequences"
        )
    matched = [layout.files(folder, root) for folder in found]
    for role in ("pre", "post", "mask"):
        patterns = getattr(layout, role)
        if patterns and not any(files[role] for files in matched):
            raise ValueError(
                f"{root}: no file in its folders matches {role}={patterns[0]}; change --sequences"
            )
    return [
        Source("_".join(folder.relative_to(root).parts), folder, root, layout)
        for folder in sorted(found + lacking)
    ]


def _belongs_to_mask(folder: Path, root: Path, layout: Layout) -> bool:
    """Tell whether a layout's masks are in this folder, apart from the cases."""
    return any(f"{{root}}/{folder.relative_to(root)}/" in pattern for pattern in layout.mask)


def _is_output(folder: Path) -> bool:
    """Tell whether inference.py wrote here: its masks and pictures are neither truth nor scan."""
    try:
        return {"args", "weights"} <= json.loads((folder / "args.json").read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _folders_in(root: Path, other_than: Path | None) -> list[Path]:
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and p.name[0] not in "._"]
    folders = [p for p in folders if not _is_output(p)]
    return [p for p in folders if not other_than or p.resolve() != other_than.resolve()]


def _cases_in(root: Path, other_than: Path | None) -> list[Source]:
    """List the volume files in a folder, the folders in it that are cases, and DICOM studies."""
    whole, folders, volumes = absolute(root), _folders_in(root, other_than), volumes_in(root)
    holding = [folder for folder in folders if _holds_case(folder)]
    if holding and is_scan(root) and any(find_images(root, deep=False)):
        raise ValueError(
            f"{root}: holds DICOM files beside the case {holding[0].name}; give each case a folder"
        )
    if volumes and (is_scan(root) or (len(volumes) > 1 and _is_one_case(whole))):
        return [_source(whole)]
    searched = {folder.name for folder in folders if not volumes_in(folder)}
    studies = find_studies(
        whole, lambda folder: folder.parent == whole and folder.name not in searched
    )
    cases = [Source(study.name, study.folder, whole, study=study) for study in studies]
    if any(study.folder == whole for study in studies):
        return cases
    taken = {study.folder.relative_to(whole).parts[0] for study in studies}
    others = [folder for folder in folders if folder.name not in taken]
    if not (volumes or holding or studies) and _holds_slices(root):
        return [_source(whole)]
    say_lost_masks(root, volumes)
    if not (volumes or holding or studies):
        _check_not_too_high(root, others)
    if volumes:  # other folders beside them may be anything; else opening them says what they lack
        others = volumes + [folder for folder in others if folder in holding]
    cases += [_source(path) for path in others]
    return sorted(cases, key=lambda case: (case.folder, case.name))


def _check_not_too_high(root: Path, folders: Sequence[Path]) -> None:
    """Raise ValueError, naming the folder of the cases, if they are further down than expected."""
    for folder in folders:
        for place in (folder, *_folders_in(folder, None)):
            inner = [each for each in _folders_in(place, None) if _holds_case(each)]
            if len(inner) > 1:
                raise ValueError(
                    f"{root}: holds no case itself; {place} holds them: give that folder"
                )


def _source(path: Path) -> Source:
    return Source(scan_name(path), path, path.parent)


def _is_one_case(folder: Path) -> bool:
    """Tell whether the volume files of a folder are one FLAIR and its other sequences."""
    try:
        files = sequences_in(folder, folder.parent)
    except ValueError:  # two of a kind: the files of several cases
        return False
    return files is not None and bool(files["pre"] or files["post"])


def _holds_case(folder: Path) -> bool:
    return _holds_slices(folder) or bool(volumes_in(folder))


def _holds_slices(folder: Path) -> bool:
    return any(SLICE_NAME.match(path.name) for path in folder.iterdir())


def find_case(path: Path, root: Path | None = None, layout: Layout | None = None) -> Case:
    """Open the case in a folder or volume file; ValueError, naming the file, if it is unusable."""
    root = root or path.parent
    if layout:
        return _in_layout(path, sequences_in(path, root, layout), layout)
    if not path.is_dir():
        return _find_scan(path)
    volumes = volumes_in(path)
    if is_scan(path) and volumes:
        raise ValueError(f"{path}: holds DICOM files and {volumes[0].name}; move one of them away")
    if not volumes:
        studies = find_studies(absolute(path))
        if len(studies) > 1:
            names = " and ".join(study.name for study in studies)
            raise ValueError(f"{path}: holds the DICOM studies {names}; give the folder of one")
        if studies:
            return _open_study(replace(studies[0], name=path.name, folder=path))
        if not _holds_slices(path):
            check_format(path)
            check_not_only_masks(path)
        return find_slices(path)
    if _holds_slices(path):
        raise ValueError(f"{path}: holds slices and {volumes[0].name}; move one of them away")
    if len(volumes) == 1:
        return replace(_find_scan(volumes[0]), name=path.name)
    if files := sequences_in(path, root):
        return _in_layout(path, files)
    raise ValueError(
        f"{path}: holds {volumes[0].name} and {volumes[1].name}; name its sequences with "
        "--sequences, or with --flair, --pre and --post, or give each case one file of three "
        "channels"
    )


def _in_layout(folder: Path, files: dict[str, Path | None], layout: Layout | None = None) -> Scan:
    """Open the scan whose sequences a layout has found."""
    mask = files["mask"]
    if mask is None and not (layout and layout.of_user and layout.mask):
        mask = mask_of(files["flair"])
    return _with_notes(Scan.open(folder.name, [files["pre"], files["flair"], files["post"]], mask))


def find_sequences(flair: Path, pre: Path | None, post: Path | None) -> Scan:
    """Open the scan with one file per sequence, named after FLAIR and its folder."""
    whole = absolute(flair)
    name = f"{whole.parent.name}_{scan_name(whole)}"
    return _with_notes(Scan.open(name, [pre, flair, post], mask_of(whole)))


def _with_notes(scan: Scan) -> Scan:
    """Note the sequences that are another one by their name, or by their DICOM header."""
    notes = []
    for role, path in zip(SEQUENCES, scan.slices, strict=True):
        if role != "FLAIR" and path == scan.flair:
            continue
        is_series = isinstance(path, Series)
        said = contradiction(role, path.words if is_series else scan_name(path))
        if said:
            notes.append(f"{role} is {path.name}, which says {said!r}: check the order")
        elif is_series and role == "FLAIR" and not path.may_be_flair:
            notes.append(f"{role} is {path.summary(path.path)}, which may be another sequence")
    return replace(scan, chosen="; ".join(notes))


def _open_study(study: Study) -> Scan:
    """Open a DICOM study; its mask is <case>_mask, beside its folder or in it, or <FLAIR>_mask."""
    series, said = sort_study(study)
    files = [series.get(name) for name in SEQUENCES]
    folder, name = study.folder, study.name
    places = folder.with_name(name), folder / name, series["FLAIR"].path
    masks = [mask_of(place) for place in places]
    return Scan.open(name, files, next(filter(None, masks), None), said)


def _find_scan(path: Path) -> Scan:
    scan = Scan.open(scan_name(path), [path], mask_of(path))
    said = contradiction("FLAIR", scan.name) or mask_words(scan.name)
    if scan.channels == 1 and said:
        raise ValueError(
            f"{path}: its one channel would be used as FLAIR, but its name says {said!r}; name "
            "the sequences with --flair, --pre and --post"
        )
    return scan
