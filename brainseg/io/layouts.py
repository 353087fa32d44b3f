"""The cases in a folder: slices as images, medical volume files, DICOM series, cohorts."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .described import DescribedCase, described_cases
from .dicom import find_images
from .formats import (
    absolute,
    check_format,
    check_not_only_masks,
    is_scan,
    say_lost_masks,
    scan_name,
    volumes_in,
)
from .labels import Labels
from .opening import (
    BIDS,
    Layout,
    case_folders,
    find_case,
    folders_in,
    holds_case,
    holds_slices,
    is_one_case,
    is_output,
    name_below,
    open_study,
)
from .scans import Scan
from .slices import Case, errors_name
from .studies import Study, find_studies


@dataclass(frozen=True)
class Source:
    """A case that has not been read yet: `folder` (or file) holds it, `root` all cases."""

    name: str
    folder: Path
    root: Path
    labels: Labels = field(default_factory=Labels, compare=False, repr=False)
    layout: Layout | None = None  # None: found from the files in the folder
    scan: Scan | None = field(default=None, repr=False)  # of files that the user names
    study: Study | None = field(default=None, repr=False)  # of DICOM
    patient: str = field(default="", compare=False)  # as in Case
    subset: str = field(default="", compare=False)
    picked: tuple[int, ...] = ()  # as in Case
    described: DescribedCase | None = field(default=None, repr=False)  # by a dataset.json
    given_spacing: tuple[float, float, float] | None = None  # as in Case

    @property
    def patient_id(self) -> str:
        """Return the PatientID of the DICOM headers; empty if they name nobody."""
        if self.scan:
            return self.scan.patient_id
        return self.study.patient if self.study else ""

    def open(self) -> Case:
        """Open the case without reading voxels; ValueError, naming the file, if it is unusable."""
        with errors_name(self.folder):
            if self.scan:
                case = self.scan
            elif self.study:
                case = open_study(self.study)
            elif self.described:
                if not self.described.flair:
                    raise ValueError(f"{self.root}: {self.name} has no FLAIR; add its file")
                case = Scan.open(self.name, self.described.files, self.described.mask)
            else:
                case = find_case(self.folder, self.root, self.layout)
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


def find_cases(root: Path | str, names: Sequence[str] | None = None) -> list[Case]:
    """Open every case of `list_cases`; ValueError, naming the file, if one is unusable."""
    return list(map(Source.open, choose_named(list_cases(root), names, root)))


def list_cases(
    root: Path | str,
    other_than: Path | None = None,
    layout: Layout | None = None,
    labels: Labels | None = None,
    channels: Sequence[int] | None = None,
) -> list[Source]:
    """List the cases in `root`, which holds folders and volume files or is itself a case, by name.

    Never the folder `other_than`, nor predictions. `layout` says where files are, `channels` which
    of a file's are pre-contrast, FLAIR and post-contrast, or FLAIR.
    Raises FileNotFoundError or ValueError if there is nothing, or two cases have one name.
    """
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder; give the folder that holds the cases")
    if not root.is_dir() and not is_scan(root):
        check_format(root)
        raise ValueError(f"{root}: is not a volume file; give one, or the folder of its case")
    if is_output(root) or is_output(root.resolve().parent):
        raise ValueError(f"{root}: holds predictions (args.json); give the folder of the scans")
    sources = _sources_in(root, other_than, layout, tuple(channels or ()))
    if not sources:
        check_format(root)
        check_not_only_masks(root)
        raise ValueError(
            f"{root}: holds no case folder, no volume file, no DICOM image and no slice named "
            "<anything>_<number>.tif or .png; give the folder that holds the cases, or one case"
        )
    by_name: dict[str, Source] = {}
    for source in sources:
        if labels:
            source = replace(source, labels=labels)
        folder = str(source.folder)
        if folder.encode(errors="ignore").decode() != folder:
            raise ValueError(f"{ascii(folder)}: its name is not UTF-8; rename it")
        first = by_name.setdefault(source.name, source)
        if first != source:
            raise ValueError(
                f"{first.folder} and {source.folder.name} have the same case name; rename one"
            )
    return list(by_name.values())


def choose_named(
    sources: Sequence[Source], names: Sequence[str] | None, root: Path | str
) -> list[Source]:
    """Choose the cases in `root` with some names, or all; ValueError if one is missing."""
    if names is None:
        return list(sources)
    missing = sorted(set(names) - {source.name for source in sources})
    if missing:
        raise ValueError(f"{root}: holds no case {missing[0]!r}; check the name")
    return [source for source in sources if source.name in names]


def _sources_in(
    root: Path, other_than: Path | None, layout: Layout | None, picked: tuple[int, ...]
) -> list[Source]:
    path = absolute(root)
    if not root.is_dir():
        return [replace(_source(path), picked=picked)]
    if layout and not is_scan(root):
        top, folders = case_folders(path, layout, other_than)
        return [Source(name_below(top, each), each, top, layout=layout) for each in folders]
    described = described_cases(path, picked)
    if described is not None:
        sources = []
        for case in described:
            folder = case.flair or path  # FLAIR may be missing
            sources.append(Source(case.name, folder, path, picked=case.channels, described=case))
        return sources
    sessions = _bids_sessions(path)
    if sessions:
        return sessions
    if (root / "images_structural").is_dir():  # UPENN-GBM: it has other folders beside this one
        root = root / "images_structural"
    cases = _cases_in(root, other_than)
    return [replace(case, picked=picked) for case in cases]


def _bids_sessions(root: Path) -> list[Source]:
    """List the sessions of a BIDS data set, or of one subject if `root` is its folder."""
    top, subjects = root, sorted(root.glob("sub-*"))
    if root.name.startswith("sub-"):
        root = root.resolve()  # if it is a link, its masks are beside its target
        top, subjects = root.parent, [root]
    folders = []
    for subject in subjects:
        for anat in [*subject.glob("anat"), *subject.glob("ses-*/anat")]:
            if anat.is_dir():
                folders.append(anat.parent)
    folders.sort()
    return [Source(name_below(top, each), each, top, layout=BIDS) for each in folders]


def _cases_in(root: Path, other_than: Path | None) -> list[Source]:
    """List the volume files in a folder, the folders in it that are cases, and DICOM studies."""
    path, folders, volumes = absolute(root), folders_in(root, other_than), volumes_in(root)
    holding = list(filter(holds_case, folders))
    if holding and is_scan(root) and any(find_images(root, deep=False)):
        raise ValueError(
            f"{root}: holds DICOM files beside the case {holding[0].name}; give each case a folder"
        )
    if volumes and (is_scan(root) or (len(volumes) > 1 and is_one_case(path))):
        return [_source(path)]
    searched = {path / folder.name for folder in folders if not volumes_in(folder)}
    studies = find_studies(path, skip=set(path.iterdir()) - searched)
    cases = [Source(study.name, study.folder, path, study=study) for study in studies]
    if any(study.folder == path for study in studies):
        return cases
    if not (volumes or holding or studies) and holds_slices(root):
        return [_source(path)]
    say_lost_masks(root, volumes)
    taken = {study.folder.relative_to(path).parts[0] for study in studies}
    others = [folder for folder in folders if folder.name not in taken]
    if not (volumes or holding or studies):
        _check_not_too_high(root, others)
    for folder in others:
        # Beside volumes, other folders may be anything; else opening them says what they lack.
        if folder in holding or not volumes:
            cases.append(_source(folder))
    cases += map(_source, volumes)
    return sorted(cases, key=lambda case: (case.folder, case.name))


def _check_not_too_high(root: Path, folders: Sequence[Path]) -> None:
    """Raise ValueError, naming the folder of the cases, if they are further down than expected."""
    places, cases = [], 0
    for folder in folders:
        for place in (folder, *folders_in(folder, None)):
            inner = list(filter(holds_case, folders_in(place, None)))
            if inner:
                places.append(place)
                cases += len(inner)
    if cases < 2:
        return
    if len(places) == 1:
        raise ValueError(f"{root}: holds no case itself; {places[0]} holds them: give that folder")
    raise ValueError(
        f"{root}: holds no case itself; {places[0].name}, {places[1].name} and so on hold them: if "
        "these are patients, name the files of a scan, as in --sequences 'flair=flair.nii.gz' "
        "'pre=t1.nii.gz'; else give one of these folders"
    )


def _source(path: Path) -> Source:
    return Source(scan_name(path), path, path.parent)
