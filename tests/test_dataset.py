"""Which cases, which subset, which slice next."""

from collections import Counter
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import SIZE, open_all, same

from brainseg.io.layouts import find_cases
from brainseg.io.slices import Case
from brainseg.phantom import write_data_set
from brainseg.preprocess import preprocess, preprocess_mask
from brainseg.splits import SPLITS, SUBSETS, patient_of, select_cases, split_folds, subset_of
from dataset import BrainSegmentationDataset
from utils import make_generator


@pytest.fixture(scope="module")
def data(phantoms) -> BrainSegmentationDataset:
    """All 12 phantom cases of 8 slices."""
    return BrainSegmentationDataset(phantoms, "all", SIZE)


def made_up(names: list[str]) -> list[Case]:
    return [Case(name, (1,), (Path("/data") / name / f"{name}_1.tif",), ()) for name in names]


def names_of(cases: list[Case]) -> list[str]:
    return [case.name for case in cases]


# Items


def test_items(data, phantoms):
    assert len(data) == 12 * 8 and data.in_channels == 3
    volume, truth = find_cases(phantoms)[3].read_pair()
    images, frame = preprocess(volume, SIZE)
    mask = preprocess_mask(truth, frame)
    for s in range(8):
        image, label = data[3 * 8 + s]
        assert image.dtype == label.dtype == torch.float32
        assert image.shape == (3, SIZE, SIZE) and label.shape == (1, SIZE, SIZE)
        assert set(label.unique().tolist()) <= {0.0, 1.0}, "trap 3"
        torch.testing.assert_close(image, images[s], atol=2e-3, rtol=1e-3)  # half precision
        assert torch.equal(label[0], mask[s].float())
    assert np.array_equal(data.volumes[3].truth, truth) and data.volumes[3].frame == frame


def test_an_item_is_always_the_same_and_the_callers_own(data):
    image, mask = data[20]
    before = image.clone(), mask.clone()
    image.add_(1), mask.add_(1)
    assert same([data[20]], [before])


def test_batch_is_the_items_as_stored(data):
    indices = [5, 90, 5]
    images, masks = data.batch(indices)
    assert images.dtype == torch.float16 and masks.dtype == torch.bool
    for k, index in enumerate(indices):
        assert torch.equal(images[k].float(), data[index][0])
        assert torch.equal(masks[k].float(), data[index][1])


def test_batch_with_neighbours(data):
    """Slices 0 and 7 are the ends of a case, slice 8 the start of the next one."""
    images, masks = data.batch([0, 3, 7, 8], neighbours=1)
    assert images.shape == (4, 9, SIZE, SIZE)
    for place, seen in enumerate([(0, 0, 1), (2, 3, 4), (6, 7, 7), (8, 8, 9)]):
        expected, _ = data.batch(seen)
        assert torch.equal(images[place], expected.flatten(0, 1))
    assert torch.equal(masks, data.batch([0, 3, 7, 8])[1])


def test_locate_says_case_and_slice_number(data):
    assert data.locate(0) == ("phantom_000", 1)
    assert data.locate(7) == ("phantom_000", 8)
    assert data.locate(8) == ("phantom_001", 1)
    assert len({data.locate(index) for index in range(len(data))}) == len(data)


def test_locate_gives_the_number_of_the_file(two):
    for path in (two / "phantom_001").iterdir():
        stem, number, *rest = path.stem.rsplit("_", 2 if "mask" in path.stem else 1)
        path.rename(path.with_name("_".join([stem, str(int(number) + 40), *rest]) + ".tif"))
    data = BrainSegmentationDataset(two, "all", SIZE)
    assert [data.locate(index)[1] for index in (0, 7, 8)] == [41, 48, 1]


def test_number_of_workers_changes_nothing(two):
    one, many = (open_all(two, cache=two.parent / f"{w}", workers=w) for w in (1, 4))
    assert same(one, many)


# Subsets


def listed(subset: str) -> list[str]:
    return (SPLITS / f"{subset}.txt").read_text().split()


LGG = [name for subset in SUBSETS for name in listed(subset)]


def test_lgg_lists():
    """78 / 10 / 22 cases, no patient in two of them."""
    chosen = {subset: names_of(select_cases(made_up(LGG), subset)) for subset in SUBSETS}
    assert {subset: len(names) for subset, names in chosen.items()} == {
        "train": 78,
        "validation": 10,
        "test": 22,
    }
    assert all(set(chosen[subset]) == set(listed(subset)) for subset in SUBSETS)
    patients = [{patient_of(name) for name in names} for names in chosen.values()]
    assert len(set.union(*patients)) == sum(map(len, patients)) == 110
    assert len(select_cases(made_up(LGG), "all")) == 110


def test_another_scan_of_an_lgg_patient_stays_in_its_subset():
    for name in LGG:
        assert subset_of(f"{patient_of(name)}_20991231") == subset_of(name), name


def test_real_cases_fall_into_their_lists(lgg):
    for case in find_cases(lgg):
        assert case.name in listed(subset_of(case.name))


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
    ],
)
def test_patient_is_the_name_without_date_or_session(case, patient):
    assert patient_of(case) == patient


PATIENTS = [f"sub-{k:03d}" for k in range(200)]
SCANS = [f"{patient}_ses-{s}" for patient in PATIENTS for s in "ab"]


def test_no_patient_is_in_two_subsets():
    chosen = {subset: names_of(select_cases(made_up(SCANS), subset)) for subset in SUBSETS}
    assert sorted(sum(chosen.values(), [])) == SCANS
    patients = [{patient_of(name) for name in names} for names in chosen.values()]
    assert sum(map(len, patients)) == len(PATIENTS)
    train, validation, test = map(len, patients)
    assert 120 < train < 160 and 10 < validation < 32 and 25 < test < 57


def test_adding_a_case_moves_no_other():
    """Trap 11: adding one case reshuffled the whole split."""
    for subset in SUBSETS:
        before = names_of(select_cases(made_up(SCANS[1:]), subset))
        after = names_of(select_cases(made_up(SCANS), subset))
        assert [name for name in after if name != SCANS[0]] == before


def test_hash_split_is_the_same_for_ever():
    """A change here would put cases that weights were trained on into the test subset."""
    names = [f"phantom_{k:03d}" for k in range(12)]
    assert [k for k, name in enumerate(names) if subset_of(name) == "test"] == [0, 7, 9]
    assert [k for k, name in enumerate(names) if subset_of(name) == "validation"] == [11]


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
        assert not {*map(patient_of, train)} & {*map(patient_of, validation)}
        held_out.append(validation)
    assert sum(map(len, held_out)) == len(set.union(*held_out)) == len(set(names) - test)
    sizes = [len({patient_of(name) for name in fold}) for fold in held_out]
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
    """Of every three patients that follow one another by volume, each fold holds out one."""
    cases = [case for case in find_cases(phantoms) if subset_of(case.name) != "test"]
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
def test_a_fold_that_is_not_there_is_refused(fold):
    with pytest.raises(ValueError, match=f"fold {fold} of 5: --fold runs from 0 to 4"):
        split_folds(made_up(LGG), 5, fold)


def test_dataset_of_a_fold(phantoms, tmp_path):
    parts = BrainSegmentationDataset.train_and_validation(
        phantoms, 3, 1, image_size=SIZE, cache=tmp_path
    )
    names = [{volume.name for volume in part.volumes} for part in parts]
    assert [len(part) for part in names] == [6, 3]
    assert not names[0] & names[1]


# Sampling


def test_sampling_weights_by_hand(data):
    """A case uniformly, then a slice by its area plus a tenth of the mean area of the case."""
    weights = data.sampling_weights()
    areas = np.array([data[index][1].sum().item() for index in range(len(data))]).reshape(12, 8)
    for case in range(12):
        total = sum(area + areas[case].mean() / 10 for area in areas[case])
        for s in range(8):
            expected = 1 / 12 * (areas[case, s] + areas[case].mean() / 10) / total
            assert weights[case * 8 + s].item() == pytest.approx(expected, rel=1e-6)
    assert weights.sum().item() == pytest.approx(1) and (weights > 0).all()


@pytest.mark.parametrize("background", [0, 0.5, 3])
def test_background_is_a_share_of_even_draws(data, background):
    areas = torch.tensor([data[index][1].sum().item() for index in range(len(data))]).double()
    by_area = (areas.view(12, 8) / areas.view(12, 8).sum(1, keepdim=True) / 12).flatten()
    share = background / (1 + background)
    expected = (1 - share) * by_area + share / len(data)
    torch.testing.assert_close(data.sampling_weights(background), expected)


def test_case_without_lesion_draws_its_slices_evenly(tmp_path):
    """Trap 2: a healthy case, of another length, is used and not fatal."""
    write_data_set(tmp_path / "images", cases=2, slices=6, size=32, no_lesion=2)
    for k in (5, 6):
        (tmp_path / f"images/phantom_001/phantom_001_{k}.tif").unlink()
        (tmp_path / f"images/phantom_001/phantom_001_{k}_mask.tif").unlink()
    data = BrainSegmentationDataset(tmp_path / "images", "all", SIZE)
    weights = data.sampling_weights()
    assert len(weights) == len(data) == 6 + 4
    torch.testing.assert_close(weights[6:], torch.full((4,), 0.5 / 4).double())
    assert weights[:6].sum().item() == pytest.approx(0.5)


def test_epochs_draw_anew_and_reach_nearly_every_slice(data):
    """Trap 1: worker seeds reset every epoch; 31 % of the slices were ever seen in 100 epochs."""
    weights = data.sampling_weights()

    def epoch(number: int) -> list[int]:
        generator = make_generator(7, 0, number)
        return torch.multinomial(weights, len(data), True, generator=generator).tolist()

    drawn = [epoch(number) for number in range(60)]
    assert len(set(map(tuple, drawn))) == 60
    assert epoch(31) == drawn[31], "a resumed training goes on with the same draws"
    assert len(set(sum(drawn, []))) > 0.95 * len(data)


# Refusals


def test_case_without_masks_is_refused(two):
    for path in (two / "phantom_002").glob("*_mask.tif"):
        path.unlink()
    with pytest.raises(ValueError, match=f"{two}/phantom_002: has no mask"):
        open_all(two)


def test_constant_volume_is_refused_by_name(two):
    for path in (two / "phantom_001").glob("*[0-9].tif"):
        iio.imwrite(path, np.full((64, 64, 3), 9, dtype=np.uint8))
    with pytest.raises(ValueError, match=f"{two}/phantom_001: every voxel is 9"):
        open_all(two)


def test_blank_case_is_used(two):
    for path in (two / "phantom_001").glob("*[0-9].tif"):
        iio.imwrite(path, np.zeros((64, 64, 3), dtype=np.uint8))
    data = BrainSegmentationDataset(two, "all", SIZE, cache=two.parent / "cache")
    assert not data[0][0].any() and data[8][0].any()
    assert data.volumes[0].frame.blank and torch.isfinite(data.sampling_weights()).all()


def test_cases_of_different_channels_are_refused(two):
    for path in (two / "phantom_001").glob("*[0-9].tif"):
        iio.imwrite(path, iio.imread(path)[..., 1])
    with pytest.raises(ValueError, match="1 in .*phantom_001, 3 in .*phantom_002") as stop:
        open_all(two)
    assert str(two) in str(stop.value)


def test_damaged_slice_is_refused_by_name(two):
    path = two / "phantom_002" / "phantom_002_4.tif"
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ValueError, match=f"{path}: not a readable image"):
        open_all(two)
