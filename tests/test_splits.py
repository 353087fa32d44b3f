"""Test the patient and subset of a case, and the folds of a cross-validation."""

from collections import Counter
from pathlib import Path

import pytest

from brainseg.io.layouts import find_cases
from brainseg.io.slices import Case
from brainseg.splits import (
    SPLITS,
    SUBSETS,
    patient_named,
    select_cases,
    split_folds,
    subset_of,
    subset_of_patient,
)


def made_up(names: list[str]) -> list[Case]:
    return [Case(name, (1,), (Path("/data") / name / f"{name}_1.tif",), ()) for name in names]


def names_of(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


def subset_named(name: str) -> str:
    return subset_of_patient(patient_named(name))


# Subsets


def listed(subset: str) -> list[str]:
    return (SPLITS / f"{subset}.txt").read_text().split()


LGG = [name for subset in SUBSETS for name in listed(subset)]


def test_lgg_lists():
    """They have 78, 10 and 22 cases, and no patient is in two of them."""
    chosen = {subset: names_of(select_cases(made_up(LGG), subset)) for subset in SUBSETS}
    assert {subset: len(names) for subset, names in chosen.items()} == {
        "train": 78,
        "validation": 10,
        "test": 22,
    }
    assert all(set(chosen[subset]) == set(listed(subset)) for subset in SUBSETS)
    patients = [{patient_named(name) for name in names} for names in chosen.values()]
    assert len(set.union(*patients)) == sum(map(len, patients)) == 110
    assert len(select_cases(made_up(LGG), "all")) == 110


def test_another_scan_of_an_lgg_patient_stays_in_its_subset():
    for name in LGG:
        assert subset_named(f"{patient_named(name)}_20991231") == subset_named(name), name


def test_real_cases_fall_into_their_lists(lgg):
    for case in find_cases(lgg):
        assert case.name in listed(subset_of(case))


@pytest.mark.parametrize(
    "case, patient",
    [
        ("TCGA_CS_4941_19960909", "TCGA_CS_4941"),
        ("TCGA-CS-4941", "TCGA_CS_4941"),
        ("TCGA_CS_4941_19960909_flair", "TCGA_CS_4941"),
        ("mine_TCGA-CS-4941-a", "TCGA_CS_4941"),
        ("anna_20240131_flair", "anna"),
        ("sub-01_ses-b_run-2", "sub-01"),
        ("anat_sub-01_FLAIR", "sub-01"),
        ("sub-01_run-2_FLAIR", "sub-01"),
        ("phantom_003", "phantom_003"),
        ("anna_2024", "anna_2024"),
        ("case_00000001", "case_00000001"),
        ("BraTS-GLI-00020-000", "BraTS-GLI-00020"),
        ("BraTS-GLI-00020-001_BraTS-GLI-00020-001-t2f", "BraTS-GLI-00020"),
        ("BraTS-MEN-RT-0001-1", "BraTS-MEN-RT-0001"),
        ("BraTS2021_00001", "BraTS2021_00001"),
        ("BraTS20_Training_001", "BraTS20_Training_001"),
        ("UPENN-GBM-00001_11", "UPENN-GBM-00001"),
        ("UPENN-GBM-00001_21", "UPENN-GBM-00001"),
        ("UCSF-PDGM-0433_FU001d_nifti", "UCSF-PDGM-0433"),
        ("UCSF-PDGM-0433_nifti", "UCSF-PDGM-0433"),
        ("Patient-001_week-044-1", "Patient-001"),
        ("anna_week12_flair", "anna"),
        ("midweek_3", "midweek_3"),
        ("anna_2024-01-31", "anna"),
        ("anna-2024-01-31T1030_flair", "anna"),
        ("anna_2024-13-31", "anna_2024-13-31"),
        ("anna_20240131test", "anna_20240131test"),
    ],
)
def test_patient_is_the_name_without_date_or_session(case, patient):
    assert patient_named(case) == patient


PATIENTS = [f"sub-{k:03d}" for k in range(200)]
SCANS = [f"{patient}_ses-{s}" for patient in PATIENTS for s in "ab"]


def test_no_patient_is_in_two_subsets():
    chosen = {subset: names_of(select_cases(made_up(SCANS), subset)) for subset in SUBSETS}
    assert sorted(sum(chosen.values(), [])) == SCANS
    patients = [{patient_named(name) for name in names} for names in chosen.values()]
    assert sum(map(len, patients)) == len(PATIENTS)
    train, validation, test = map(len, patients)
    assert 120 < train < 160 and 10 < validation < 32 and 25 < test < 57


def test_adding_a_case_moves_no_other():
    """Once, adding one case reshuffled the whole split."""
    for subset in SUBSETS:
        before = names_of(select_cases(made_up(SCANS[1:]), subset))
        after = names_of(select_cases(made_up(SCANS), subset))
        assert [name for name in after if name != SCANS[0]] == before


def test_hash_split_is_the_same_for_ever():
    """A change here would move training cases of existing weights into the test subset."""
    names = [f"phantom_{k:03d}" for k in range(12)]
    assert [k for k, name in enumerate(names) if subset_named(name) == "test"] == [0, 7, 9]
    assert [k for k, name in enumerate(names) if subset_named(name) == "validation"] == [11]


def test_unknown_subset_and_empty_subset_are_refused():
    with pytest.raises(ValueError, match="'val'.* known: all, train, validation, test"):
        select_cases(made_up(SCANS), "val")
    with pytest.raises(ValueError, match="none of the 2 cases .* 'validation'"):
        select_cases(made_up(listed("test")[:2]), "validation")


# Folds


@pytest.mark.parametrize("folds", [2, 5, 11])
@pytest.mark.parametrize("names", [LGG, SCANS], ids=["LGG", "others"])
def test_folds_are_a_partition_by_patient(names, folds):
    cases = made_up(names)
    test = set(names_of(select_cases(cases, "test")))
    held_out = []
    for fold in range(folds):
        train, validation = (set(names_of(part)) for part in split_folds(cases, folds, fold))
        assert train | validation == set(names) - test, "test cases are never used"
        assert not {*map(patient_named, train)} & {*map(patient_named, validation)}
        held_out.append(validation)
    assert sum(map(len, held_out)) == len(set.union(*held_out)) == len(set(names) - test)
    sizes = [len({patient_named(name) for name in fold}) for fold in held_out]
    assert max(sizes) - min(sizes) <= 1


def test_folds_are_balanced_over_hospitals():
    cases = made_up(LGG)
    sites = [
        Counter(name.split("_")[1] for name in names_of(split_folds(cases, 5, fold)[1]))
        for fold in range(5)
    ]
    for site in set().union(*sites):
        counts = [fold[site] for fold in sites]
        assert max(counts) - min(counts) <= 1, site


def test_folds_are_balanced_over_lesion_volumes(phantoms):
    """Each fold holds out one of every three consecutive patients in order of volume."""
    cases = [case for case in find_cases(phantoms) if subset_of(case) != "test"]
    folds = [names_of(split_folds(cases, 3, fold)[1]) for fold in range(3)]
    by_volume = sorted(cases, key=lambda case: case.read_mask().sum())
    place = {case.name: k // 3 for k, case in enumerate(by_volume)}
    assert [sorted(place[name] for name in fold) for fold in folds] == [[0, 1, 2]] * 3


def test_folds_do_not_depend_on_the_order_of_the_cases():
    forth, back = (split_folds(made_up(names), 5, 2)[1] for names in (LGG, LGG[::-1]))
    assert set(names_of(forth)) == set(names_of(back))


@pytest.mark.parametrize("folds", [-1, 0, 1, 89, 1000])
def test_too_many_or_too_few_folds_are_refused(folds):
    with pytest.raises(ValueError, match=f"{folds} folds of 88 patients .* from 2 to 88"):
        split_folds(made_up(LGG), folds, 0)


@pytest.mark.parametrize("fold", [None, -1, 5])
def test_an_invalid_fold_is_refused(fold):
    with pytest.raises(ValueError, match=f"fold {fold} of 5: --fold runs from 0 to 4"):
        split_folds(made_up(LGG), 5, fold)
