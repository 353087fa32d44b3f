"""List the cases of a run, each in a subset or fold; all cases of a patient are in one."""

import functools
import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from .devices import in_order
from .io.files import USERS, read_rows
from .io.labels import Labels
from .io.layouts import Source, choose_named, list_cases
from .io.opening import Sequences, find_sequences, parse_sequences
from .io.sequences import SEQUENCES
from .io.slices import Case
from .patients import SUBSETS, Named, counted, names_of, patient_named, patient_of, site_of

SPLITS = Path(__file__).resolve().parents[1] / "splits"


def list_cohort(
    images: Path | str,
    sequences: Sequence[str] | None = None,
    labels: Sequence[int] | None = None,
    patients: Path | str | None = None,
    names: Sequence[str] | None = None,
    other_than: Path | None = None,
    channels: Sequence[int] | None = None,
    scan: Sequences | None = None,
) -> list[Source]:
    """List the cases in a folder according to --sequences, --labels, --patients, --channels.

    See `list_cases`. With `scan`, the files of one case, list that instead. Raises OSError or
    ValueError if any of them is unusable.
    """
    if channels and len(channels) not in (1, len(SEQUENCES)):
        raise ValueError(
            "--channels takes the channels of pre-contrast, FLAIR and post-contrast, or of FLAIR "
            f"alone, not {len(channels)}"
        )
    if channels and sequences:
        raise ValueError("--channels is for files of several channels; leave out --sequences")
    layout = parse_sequences(sequences)
    labels_of_run = Labels(labels)
    if scan:
        case = find_sequences(scan.flair, scan.pre, scan.post)
        opener = functools.partial(replace, case)
        everyone = [Source(case.name, case.folder, opener, case.patient_id, labels_of_run)]
    else:
        everyone = list_cases(images, other_than, layout, labels_of_run, channels)
    chosen = with_patients(choose_named(everyone, names, images), patients)
    # The subset of a case must not depend on which others are chosen beside it.
    by_name = {case.name: case for case in everyone + chosen}
    shared = share_small_cohort(list(by_name.values()))
    return choose_named(shared, names, images)


def with_patients(cases: Sequence[Named], path: Path | str | None) -> list[Named]:
    """Give cases the patients, and the subsets if it has any, of a CSV file; None: change none.

    Raises OSError or ValueError, naming file and case, if it is not a table with the columns case,
    patient and perhaps subset, lacks one of the cases or contradicts itself.
    """
    if not path:
        return list(cases)
    rows = _read_patients(Path(path))
    missing = sorted(case.name for case in cases if case.name not in rows)
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(f"{path}: lacks the case {missing[0]}{others}; add a line for each")
    placed = []
    for case in cases:
        patient, subset = rows[case.name]
        placed.append(replace(case, patient=patient, subset=subset))
    return placed


def _read_patients(path: Path) -> dict[str, tuple[str, str]]:
    """Read the patient and the subset, or "", of each case."""
    wrong = f"{path}: is not a table with the columns case and patient; write CSV with both"
    lines = read_rows(path, {"case", "patient"}, wrong, USERS)
    if not lines:
        raise ValueError(wrong)
    rows: dict[str, tuple[str, str]] = {}
    subsets: dict[str, str] = {}  # of each patient
    for line in lines:
        case, patient = line["case"].strip(), line["patient"].strip()
        if not case or not patient:
            raise ValueError(
                f"{path}: the line of {case or patient or 'no case'} lacks its case or its "
                "patient; complete it"
            )
        subset = line.get("subset", "").strip()
        if "subset" in line and subset not in SUBSETS:
            raise ValueError(f"{path}: the subset of {case} must be one of {', '.join(SUBSETS)}")
        if rows.setdefault(case, (patient, subset))[0] != patient:
            raise ValueError(
                f"{path}: gives {case} the patients {rows[case][0]} and {patient}; keep one of them"
            )
        if subsets.setdefault(patient, subset) != subset:
            raise ValueError(
                f"{path}: has the patient {patient} in {subsets[patient]} and in {subset}; keep "
                "one subset for all cases of a patient"
            )
    if len(subsets) > 1 and len(set(subsets.values())) == 1 and subset:
        raise ValueError(f"{path}: has every patient in {subset}; name two subsets or none")
    return rows


def share_small_cohort(cases: Sequence[Named]) -> list[Named]:
    """Make sure that cases of two patients or more are both for training and for validation.

    By its hash alone, a small cohort may have no patient to validate on: the patients are then
    ranked by it, and the first of them train and the next one validates. Nobody moves whom the
    user or the lists of the LGG data set have placed.
    """
    placed, free = set(), set()
    for case in cases:
        if is_placed(case):
            placed.add(subset_of(case))
        else:
            free.add(patient_of(case))
    if len(free) < 2:
        return list(cases)
    ranked = sorted(free, key=_place)
    subsets = {patient: subset_of_patient(patient) for patient in ranked}
    if "train" not in placed.union(subsets.values()):
        subsets[ranked[0]] = "train"
    if "validation" not in placed.union(subsets.values()):
        after = [patient for patient in ranked if subsets[patient] == "test"]
        subsets[after[0] if after else ranked[-1]] = "validation"
    shared = []
    for case in cases:
        subset = subsets.get(patient_of(case), case.subset)
        shared.append(case if subset == subset_of(case) else replace(case, subset=subset))
    return shared


def validate_on(cases: Sequence[Named], names: Sequence[str]) -> list[Named]:
    """Validate on the cases or patients called `names`, and train on what was there.

    Raises ValueError for a name that is neither, or that the LGG lists keep for testing.
    """
    placed = []
    for case in cases:
        if case.name in names or patient_of(case) in names:
            placed.append(replace(case, subset="validation"))
            if subset_of(placed[-1]) != "validation":
                raise ValueError(
                    f"--validation {case.name}: is kept for testing (splits/test.txt); name another"
                )
        elif subset_of(case) == "test" and is_placed(case):
            placed.append(case)
        else:
            placed.append(replace(case, subset="train"))
    for name in names:
        if all(name not in (case.name, patient_of(case)) for case in cases):
            raise ValueError(f"--validation {name}: no case or patient has this name; check it")
    return placed


def by_subset(cases: Iterable[Named]) -> dict[str, list[Named]]:
    """Group cases by subset."""
    groups: dict[str, list[Named]] = {subset: [] for subset in SUBSETS}
    for case in cases:
        groups[subset_of(case)].append(case)
    return groups


def is_lgg(patient: str) -> bool:
    """Tell whether a patient is in the published LGG data set."""
    return patient in _listed()


def subset_of(case: Case | Source) -> str:
    """Return the subset of a case: that of its patient (see `subset_of_patient`), unless placed.

    A test case of the LGG data set stays one, whatever a --patients file says of it.
    """
    listed = _listed().get(patient_named(case.name))
    if listed == "test":
        return listed
    return case.subset or listed or subset_of_patient(patient_of(case))


def is_placed(case: Case | Source) -> bool:
    """Tell whether the user, or a list of the LGG data set, says which subset a case is in."""
    lgg = is_lgg(patient_named(case.name)) or is_lgg(patient_of(case))
    return lgg or bool(case.subset)


def subset_of_patient(patient: str) -> str:
    """Return `train`, `validation` or `test`: from the lists in splits/ for LGG, else by a hash.

    The hash is stable and of the patient's name: adding a case moves no other, and no patient is
    in two subsets. Of 20 patients, about 14 are for train, 2 for validation and 4 for test.
    """
    if patient in _listed():
        return _listed()[patient]
    place = _place(patient)
    if place < 700:
        return "train"
    return "validation" if place < 800 else "test"


def _place(patient: str) -> int:
    """Return the place of a patient among a thousand, by a hash of the name."""
    return int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") % 1000


def select_cases(cases: Sequence[Named], subset: str) -> list[Named]:
    """Select the cases of a subset; ValueError if it is unknown or no case is in it."""
    if subset not in (*SUBSETS, "all"):
        raise ValueError(f"no subset is called {subset!r}; known: all, {', '.join(SUBSETS)}")
    chosen = [case for case in cases if subset in ("all", subset_of(case))]
    if not chosen:
        patients = set(map(patient_of, cases))
        raise ValueError(
            f"none of the {counted(len(cases), 'case')} ({counted(len(patients), 'patient')} by "
            f"their names) falls into the subset {subset!r}; add cases of others, or "
            "place some in it with --patients (train.py: or --validation; elsewhere: --subset all)"
        )
    return chosen


def split_folds(
    cases: Sequence[Case],
    folds: int,
    fold: int,
    lesions: Mapping[str, int] | None = None,
) -> tuple[list[Case], list[Case]]:
    """Split cases for cross-validation into those to train on and those that `fold` holds out.

    Folds are by patient, balanced over hospitals (for LGG) and lesion volumes, and the same on
    every machine for the same cases and masks; cases that the user or the LGG lists set aside for
    testing are in none. `lesions` are the lesion volumes by case; by default the masks are read.
    Raises ValueError as `check_folds` does.
    """
    check_folds(cases, folds, fold)
    pool = outside_test(cases)
    if lesions is None:
        lesions = dict(zip(names_of(pool), in_order(_lesion_voxels, pool), strict=True))
    voxels = Counter()  # of each patient
    for case in pool:
        voxels[patient_of(case)] += lesions[case.name]
    # Dealt out in this order, the patients of a site, and of a size, go to different folds.
    patients = sorted(voxels, key=lambda patient: (site_of(patient), voxels[patient], patient))
    held_out = set(patients[fold::folds])
    train = [case for case in pool if patient_of(case) not in held_out]
    return train, [case for case in pool if patient_of(case) in held_out]


def outside_test(cases: Iterable[Named]) -> list[Named]:
    """List the cases that neither the user nor the lists of the LGG data set keep for testing."""
    return [case for case in cases if subset_of(case) != "test" or not is_placed(case)]


def check_folds(cases: Iterable[Named], folds: int, fold: int | None) -> None:
    """Raise ValueError unless 0 <= fold < folds and 2 <= folds <= patients outside test."""
    patients = set(map(patient_of, outside_test(cases)))
    if len(patients) < 2:
        raise ValueError("cross-validation needs two patients outside the test subset; add cases")
    if not 2 <= folds <= len(patients):
        raise ValueError(
            f"{folds} folds of {len(patients)} patients outside the test subset; "
            f"choose from 2 to {len(patients)}"
        )
    if fold is None or not 0 <= fold < folds:
        raise ValueError(f"fold {fold} of {folds}: --fold runs from 0 to {folds - 1}")


def _lesion_voxels(case: Case) -> int:
    return int(case.read_mask().sum()) if case.masks else 0


@functools.cache
def _listed() -> dict[str, str]:
    """Read the LGG patients and the subset that each is in."""
    listed = {}
    for subset in SUBSETS:
        for name in (SPLITS / f"{subset}.txt").read_text().split():
            listed[patient_named(name)] = subset
    return listed
