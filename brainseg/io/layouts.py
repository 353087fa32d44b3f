"""The cases in a folder: slices as images, medical volume files, DICOM series, cohorts."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from .described import described_sources
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
    Source,
    find_case,
    holds_case,
    holds_slices,
    is_one_case,
    open_study,
)
from .slices import Case
from .studies import find_studies


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
        if first is not source:
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
        return _cases_in_layout(path, layout, other_than)
    described = described_sources(path, picked)
    if described is not None:
        return described
    sessions = _bids_sessions(path)
    if sessions:
        return sessions
    if (root / "images_structural").is_dir():  # UPENN-GBM: it has other folders beside this one
        root = root / "images_structural"
    cases = _cases_in(root, other_than)
    return [replace(case, picked=picked) for case in cases]


def _cases_in_layout(root: Path, layout: Layout, other_than: Path | None) -> list[Source]:
    """List folders, at most two levels down, that match a layout, or that hold other volumes.

    `root` may be such a folder itself.
    """
    matching, lacking = [], []
    for folder in folders_in(root, other_than):
        if layout.fits(folder, root):
            matching.append(folder)
            continue
        inner = [each for each in folders_in(folder, other_than) if layout.fits(each, root)]
        matching += inner
        place = f"{{root}}/{folder.relative_to(root)}/"
        holds_masks = any(place in pattern for pattern in layout.mask)  # apart from the cases
        if not inner and volumes_in(folder) and not holds_masks:
            lacking.append(folder)
    if not matching and layout.fits(root, root.parent):
        return _in_layout(root.parent, [root], layout)
    files = [layout.files(folder, root) for folder in matching]
    roles = ("pre", "post", "mask") if matching else ("flair",)  # a case reports a lack of FLAIR
    for role in roles:
        patterns = getattr(layout, role)
        if patterns and not any(by_role[role] for by_role in files):
            raise ValueError(
                f"{root}: no file in its folders matches {role}={patterns[0]}; change --sequences"
            )
    return _in_layout(root, sorted(matching + lacking), layout)


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
    return _in_layout(top, folders, BIDS)


def _in_layout(root: Path, folders: Sequence[Path], layout: Layout) -> list[Source]:
    """List the cases in folders below `root`, each named after its folder."""
    sources = []
    for folder in folders:
        name = "_".join(folder.relative_to(root).parts)
        sources.append(Source(name, folder, partial(find_case, folder, root, layout)))
    return sources


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
    cases = []
    for study in studies:
        opener = partial(open_study, study)
        cases.append(Source(study.name, study.folder, opener, study.patient))
    if any(study.folder == path for study in studies):
        return cases
    if not (volumes or holding or studies) and holds_slices(root):
        return [_source(path)]
    say_lost_masks(root, volumes)
    taken = {study.folder.relative_to(path).parts[0] for study in studies}
    others = [folder for folder in folders if folder.name not in taken]
    if not (volumes or holding or studies):
        _check_not_too_high(root, others)
    passed = []
    for folder in others:
        # Beside volumes, other folders may be anything; else opening them says what they lack.
        if folder in holding or not volumes:
            cases.append(_source(folder))
        elif folder.name != "derivatives":
            passed.append(folder.name)
    if passed:
        text = "are not read, as they hold no scan themselves; give them with --images"
        tqdm.write(f"{root}: the folders {', '.join(passed)} {text}", file=sys.stderr)
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
    return Source(scan_name(path), path, partial(find_case, path))


# Folders


def is_output(folder: Path) -> bool:
    """Tell whether inference.py wrote here: its masks and pictures are neither truth nor scan."""
    try:
        return {"args", "weights"} <= json.loads((folder / "args.json").read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def folders_in(root: Path, other_than: Path | None = None) -> list[Path]:
    """List the folders in `root` that may hold cases: not `other_than`, nor predictions."""
    folders = []
    for path in sorted(root.iterdir()):
        is_other = other_than is not None and path.resolve() == other_than.resolve()
        if path.is_dir() and path.name[0] not in "._" and not is_other and not is_output(path):
            folders.append(path)
    return folders
