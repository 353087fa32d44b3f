"""Test the patient and subset of a case, and the folds of a cross-validation."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from brainseg.io.layouts import find_cases
from brainseg.io.slices import Case
from brainseg.patients import SUBSETS, alike_names, patient_named, patient_of
from brainseg.splits import (
    SPLITS,
    by_subset,
    list_cohort,
    select_cases,
    share_small_cohort,
    split_folds,
    subset_of,
    subset_of_patient,
    validate_on,
    with_patients,
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
        ("anna_2024_01_31", "anna"),
        ("anna_2024.01.31_flair", "anna"),
        ("BraTS19_2013_10_1", "BraTS19_2013_10_1"),
        ("patient01_study1", "patient01"),
        ("patient01_study2_flair", "patient01"),
        ("ms_study1_patient01", "ms_study1_patient01"),
        ("anna_baseline", "anna"),
        ("anna_follow-up", "anna"),
        ("100001_time02", "100001"),
        ("anna-month-06", "anna"),
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


def test_choosing_cases_changes_no_subset(phantoms):
    """By the hash, all of these are test cases: some of them would train if they were alone."""
    everyone = {case.name: subset_of(case) for case in list_cohort(phantoms)}
    tests = [name for name, subset in everyone.items() if subset == "test"]
    assert len(tests) > 1
    assert {subset_of(case) for case in list_cohort(phantoms, names=tests)} == {"test"}


def test_unknown_subset_and_empty_subset_are_refused():
    with pytest.raises(ValueError, match="'val'.* known: all, train, validation, test"):
        select_cases(made_up(SCANS), "val")
    with pytest.raises(ValueError, match="none of the 2 cases .* 'validation'"):
        select_cases(made_up(listed("test")[:2]), "validation")
    with pytest.raises(ValueError, match=r"none of the 1 case \(1 patient .* add cases of others"):
        select_cases(made_up(["a"]), "test")


# Folds


@pytest.mark.parametrize("folds", [2, 5, 11])
@pytest.mark.parametrize("names", [LGG, SCANS], ids=["LGG", "others"])
def test_folds_are_a_partition_by_patient(names, folds):
    cases = made_up(names)
    test = set(listed("test"))
    held_out = []
    for fold in range(folds):
        train, validation = (set(names_of(part)) for part in split_folds(cases, folds, fold))
        assert train | validation == set(names) - test, "those kept for testing are never used"
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


@pytest.mark.parametrize(
    "cases, patient",
    [
        (("UCSD-PTGBM-0002_01", "UCSD-PTGBM-0002_02"), "UCSD-PTGBM-0002"),
        (("PatientID_0003_Timepoint_1", "PatientID_0003_Timepoint_2"), "PatientID_0003"),
        (("RHUH-0001_0", "RHUH-0001_2"), "RHUH-0001"),
        (("anna_tp2", "anna-tp-3", "anna_visit2", "anna_visit-10_flair"), "anna"),
        (("tcga_cs_4941_19960909", "TCGA-CS-4941"), "TCGA_CS_4941"),
    ],
)
def test_scans_of_a_patient_over_time(cases, patient):
    assert {patient_named(case) for case in cases} == {patient}


def test_names_that_differ_in_a_last_number_are_asked_about():
    assert alike_names(made_up([f"case_{k}" for k in range(9)])) == ""
    assert alike_names(made_up(["anna_1", "bert_1"])) == ""
    public = ["TCGA_DU_5849_19950405", "TCGA_DU_6399_19830416", "TCGA_CS_5397_20010315"]
    assert alike_names(made_up(public)) == "", "their names say who they are"
    question = alike_names(made_up(["anna_1", "anna_2", "bert_1"]))
    assert question.startswith("anna_1 and anna_2 are taken for two patients: ")
    assert "--patients" in question
    question = alike_names(made_up(["anna_1", "anna_2", "bert_1", "bert_2"]))
    assert "two patients (1 other pair likewise): " in question
    told = [replace(case, patient="anna") for case in made_up(["anna_1", "anna_2"])]
    assert alike_names([*told, *made_up(["bert_1"])]) == ""


# Small cohorts


@pytest.mark.parametrize("count", range(2, 30))
@pytest.mark.parametrize("form", ["{:03d}", "patient {}", "sub-{}x", "sub-{}_ses-1"])
def test_a_small_cohort_trains_and_validates(count, form):
    cases = made_up([form.format(k) for k in range(count)])
    shared = share_small_cohort(cases)
    parts = by_subset(shared)
    assert parts["train"] and parts["validation"]
    before = by_subset(cases)
    if before["train"] and before["validation"]:
        assert shared == cases and parts == before
    else:
        moved = [case for case in shared if case.subset]
        assert len({patient_of(case) for case in moved}) <= 2
    assert share_small_cohort(cases[::-1])[::-1] == shared, "in any order"


def test_scans_of_a_patient_stay_together_in_a_small_cohort():
    cases = made_up([f"{name}_2020010{k}" for name in ("anna", "bert") for k in (1, 2)])
    parts = by_subset(share_small_cohort(cases))
    assert [len(part) for part in parts.values()] == [2, 2, 0]


def test_lists_of_lgg_are_not_shared():
    """Two cases to test on stay there, and a single patient has nobody to share with."""
    cases = made_up([*listed("test")[:2], "anna"])
    assert share_small_cohort(cases) == cases


def test_all_patients_that_nobody_set_aside_are_cross_validated():
    cases = made_up([f"{k:03d}" for k in range(12)] + listed("test"))
    held_out = [name for fold in range(3) for name in names_of(split_folds(cases, 3, fold)[1])]
    assert sorted(held_out) == [f"{k:03d}" for k in range(12)]


TABLE = "case,patient,subset\n{}"


@pytest.mark.parametrize(
    "lines, fault",
    [
        ("a,p1,train\nb,p1,validation\nc,p2,test\n", "has the patient p1 in train and in valid"),
        ("a,p1,train\nb,p2,train\nc,p3,train\n", "has every patient in train"),
        ("a,p1,training\nb,p2,validation\nc,p3,test\n", "the subset of a must be one of train"),
        ("a,p1,train\nb,p2,\nc,p3,test\n", "the subset of b must be one of train"),
    ],
)
def test_a_bad_column_of_subsets_is_refused(tmp_path, lines, fault):
    path = tmp_path / "patients.csv"
    path.write_text(TABLE.format(lines))
    with pytest.raises(ValueError, match=f"patients.csv: {fault}"):
        with_patients(made_up(["a", "b", "c"]), path)


def test_a_column_says_the_subset(tmp_path):
    path = tmp_path / "patients.csv"
    path.write_text(TABLE.format("a,p1,test\nb,p2,train\nc,p3,validation\n"))
    cases = share_small_cohort(with_patients(made_up(["a", "b", "c"]), path))
    assert [subset_of(case) for case in cases] == ["test", "train", "validation"]
    assert names_of(split_folds(cases, 2, 0)[0] + split_folds(cases, 2, 0)[1]) == ["b", "c"][::-1]


def test_named_cases_and_patients_are_validated_on():
    cases = made_up(["anna_20200101", "anna_20210101", "bert", "carl", *listed("test")[:1]])
    parts = by_subset(validate_on(cases, ["anna", "carl"]))
    assert names_of(parts["validation"]) == ["anna_20200101", "anna_20210101", "carl"]
    assert names_of(parts["train"]) == ["bert"] and len(parts["test"]) == 1
    with pytest.raises(ValueError, match="--validation dora: no case or patient"):
        validate_on(cases, ["anna", "dora"])


def test_four_cases_of_the_lgg_data_set_can_be_trained_on():
    """The lists place all of them in train; the error says what to do, and that works."""
    cases = made_up(listed("train")[:4])
    with pytest.raises(ValueError, match="train.py: or --validation"):
        select_cases(cases, "validation")
    name = cases[1].name
    assert names_of(select_cases(validate_on(cases, [name]), "validation")) == [name]
    assert len(select_cases(validate_on(cases, [name]), "train")) == 3
    test_case = listed("test")[0]
    with pytest.raises(ValueError, match=f"{test_case}: is kept for testing"):
        validate_on(made_up([*listed("train")[:4], test_case]), [test_case])
