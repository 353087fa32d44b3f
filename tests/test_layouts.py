"""Test the layouts that data sets come in: dataset.json, several channels, plain names."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

import inference
from brainseg.io.layouts import find_case, list_cases
from brainseg.patients import patient_of
from brainseg.splits import list_cohort

RNG = np.random.default_rng(0)
VOLUME = RNG.integers(0, 900, (6, 20, 24, 4)).astype(np.int16)  # FLAIR, T1, T1 with contrast, T2
MASK = (VOLUME[..., 0] > 700).astype(np.uint8)
NNUNET = {"channel_names": {"0": "FLAIR", "1": "T1", "2": "T1ce", "3": "T2"}, "labels": {"x": 1}}
DECATHLON = {"modality": {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}}


def write(path: Path, voxels: np.ndarray) -> Path:
    """Write (S, H, W) or (S, H, W, C) as an axial volume of 1 mm, the channels as a fourth axis."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if voxels.ndim == 4:
        images = [SimpleITK.GetImageFromArray(voxels[..., k]) for k in range(voxels.shape[3])]
        SimpleITK.WriteImage(SimpleITK.JoinSeries(images), str(path))
    else:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), str(path))
    return path


def write_nnunet(root: Path, description: dict | None = NNUNET, cases: int = 2) -> Path:
    for case in range(cases):
        for channel in range(4):
            write(root / "imagesTr" / f"head_{case}_{channel:04d}.nii.gz", VOLUME[..., channel])
        write(root / "labelsTr" / f"head_{case}.nii.gz", MASK)
    if description is not None:
        (root / "dataset.json").write_text(json.dumps(description))
    return root


def write_decathlon(root: Path, description: dict = DECATHLON, cases: int = 2) -> Path:
    for case in range(cases):
        write(root / "imagesTr" / f"BRATS_{case:03d}.nii.gz", VOLUME)
        write(root / "imagesTr" / f"._BRATS_{case:03d}.nii.gz", MASK)  # of macOS, in the archive
        write(root / "labelsTr" / f"BRATS_{case:03d}.nii.gz", MASK)
    (root / "dataset.json").write_text(json.dumps(description))
    return root


def as_read(root: Path, **options) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Return the names of the cases in a folder, and volume and mask of the first one."""
    cases = [source.open() for source in list_cases(root, **options)]
    volume, mask = cases[0].read_pair()
    return [case.name for case in cases], volume, mask


@pytest.mark.parametrize("make", [write_nnunet, write_decathlon])
@pytest.mark.parametrize("below", ["", "imagesTr"])
def test_dataset_json_says_which_channel_is_flair(tmp_path, make, below):
    root = make(tmp_path / "Dataset001_Glioma")
    names, volume, mask = as_read(root / below)
    assert len(names) == 2 and not any(name.startswith("._") for name in names)
    assert sorted(volume[..., 1].ravel()) == sorted(VOLUME[..., 0].ravel()), "FLAIR"
    assert sorted(volume[..., 0].ravel()) == sorted(VOLUME[..., 1].ravel()), "pre-contrast"
    assert sorted(volume[..., 2].ravel()) == sorted(VOLUME[..., 2].ravel()), "post-contrast"
    assert (mask == (volume[..., 1] > 700)).all(), "the mask is on FLAIR's grid"


@pytest.mark.parametrize("make", [write_nnunet, write_decathlon])
def test_flair_stands_in_for_what_a_data_set_lacks(tmp_path, make):
    key, names = ("channel_names", NNUNET) if make is write_nnunet else ("modality", DECATHLON)
    description = {key: {number: name for number, name in names[key].items() if number in "023"}}
    case = list_cases(make(tmp_path, description))[0].open()
    volume = case.read()
    assert (volume[..., 0] == volume[..., 1]).all() and (volume[..., 2] != volume[..., 1]).any()
    assert list(case.replaced) == ["pre-contrast"]


@pytest.mark.parametrize(
    "description, fault",
    [
        ({"channel_names": {"0": "T1", "1": "T2"}}, "dataset.json: names no FLAIR .*T1, T2"),
        ({"channel_names": {"0": "FLAIR", "1": "FLAIR"}}, "0 and 1 are both FLAIR"),
        ({"channel_names": {"0": "FLAIR", "9": "T1"}}, "head_0 has no channel 0009"),
        ({"channel_names": {"first": "FLAIR"}}, "dataset.json: is not the description"),
        ({}, "dataset.json: names no FLAIR .*none"),
        ([], "dataset.json: is not the description"),
        (None, "imagesTr: holds one file per channel, but no dataset.json"),
    ],
)
def test_an_unclear_dataset_json_is_refused(tmp_path, description, fault):
    write_nnunet(tmp_path, description)
    with pytest.raises(ValueError, match=fault):
        list_cases(tmp_path / "imagesTr")


@pytest.mark.parametrize("cases", [1, 2])
def test_channels_in_a_folder_of_another_name_are_no_cases(tmp_path, cases):
    """Once, T1 and T2 were segmented as FLAIR."""
    folder = write_nnunet(tmp_path, cases=cases) / "imagesTr"
    write(folder / "template.nii.gz", VOLUME[..., 0])
    write(folder / "head_9_0001.nii.gz", VOLUME[..., 1])  # of a case that lacks the others
    (folder / "head_8_0000.nii.gz").write_bytes(b"damaged")
    folder.rename(tmp_path / "scans")
    with pytest.raises(ValueError, match="head_0_0000 and head_0_0001 seem to be channels of one"):
        list_cases(tmp_path / "scans")


@pytest.mark.parametrize("last, side", [("0004", 20), ("0001", 21)])
def test_numbered_cases_are_no_channels(tmp_path, last, side):
    """They have numbers of other kinds, or other grids."""
    write(tmp_path / "case_0000.nii.gz", VOLUME[:, :20, :, 0])
    write(tmp_path / f"case_{last}.nii.gz", np.ones((6, side, 24), np.int16))
    assert len(list_cases(tmp_path)) == 2


def test_numbered_cases_with_masks_are_no_channels(tmp_path):
    for number in range(2):
        write(tmp_path / f"case_000{number}.nii.gz", VOLUME[..., 0])
        write(tmp_path / f"case_000{number}_mask.nii.gz", MASK)
    assert [source.name for source in list_cases(tmp_path)] == ["case_0000", "case_0001"]


@pytest.mark.parametrize("description", [None, {"channel_names": {"0": "MRI", "1": "MRI2"}}])
def test_channels_choose_without_a_description(tmp_path, description):
    root = write_nnunet(tmp_path, description)
    _, volume, _ = as_read(root / "imagesTr", channels=(1, 0, 2))
    assert sorted(volume[..., 1].ravel()) == sorted(VOLUME[..., 0].ravel())
    (case, _) = list_cases(root / "imagesTr", channels=(3,))
    assert sorted(case.open().read()[..., 1].ravel()) == sorted(VOLUME[..., 3].ravel())


def test_channels_of_a_file_of_four_axes(tmp_path):
    path = write(tmp_path / "head.nii.gz", VOLUME)
    (source,) = list_cohort(path, channels=[1, 0, 2])
    volume = source.open().read()
    assert sorted(volume[..., 1].ravel()) == sorted(VOLUME[..., 0].ravel())
    (source,) = list_cohort(path, channels=[0])
    case = source.open()
    assert case.read().shape[3] == 3 and list(case.replaced) == ["pre-contrast", "post-contrast"]


def test_three_volumes_of_another_image_are_doubtful(tmp_path):
    for name, doubtful in (("p1_dwi", True), ("p1-ADC", True), ("p1_post", False)):
        case = find_case(write(tmp_path / f"{name}.nii.gz", VOLUME[..., :3]))
        assert bool(case.doubts) == doubtful
        if doubtful:
            assert "are its volumes pre-contrast, FLAIR, post-contrast?" in case.doubts[0]


@pytest.mark.parametrize(
    "channels, fault",
    [
        ([1, 0, 4], "channels 0 to 3; there is no 4"),
        ([0, 1], "--channels takes .*, not 2"),
        ([1, 0, 2, "--sequences", "flair=head"], "--channels is for .*; leave out --sequences"),
        ([1, 0, 2, "--flair", "head.nii.gz"], "--flair is one scan; leave out .*--channels"),
    ],
)
def test_channels_out_of_range_are_refused(tmp_path, channels, fault, capsys):
    path = write(tmp_path / "head.nii.gz", VOLUME)
    words = ["--images", path, "--predictions", tmp_path / "p", "--channels", *channels]
    with pytest.raises(SystemExit) as stop:
        inference.main([str(word) for word in words])
    assert re.search(fault, f"{stop.value} {capsys.readouterr()}")


def test_plain_names_are_a_case(tmp_path):
    """As the README calls them."""
    for name, channel in (("flair", 0), ("t1", 1), ("t1ce", 2)):
        write(tmp_path / "anna" / f"{name}.nii.gz", VOLUME[..., channel])
    write(tmp_path / "anna" / "mask.nii.gz", MASK)
    (source,) = list_cases(tmp_path)
    volume, mask = source.open().read_pair()
    assert source.name == "anna" and source.open().replaced == []
    assert sorted(volume[..., 2].ravel()) == sorted(VOLUME[..., 2].ravel())
    assert (mask == (volume[..., 1] > 700)).all()


def test_folders_that_are_passed_over_are_named(tmp_path, capsys):
    write(tmp_path / "loose.nii.gz", VOLUME[..., 0])
    write(tmp_path / "named" / "flair.nii.gz", VOLUME[..., 0])
    write(tmp_path / "more" / "anna" / "flair.nii.gz", VOLUME[..., 0])
    assert [source.name for source in list_cases(tmp_path)] == ["loose", "named"]
    assert f"{tmp_path}: the folders more are not read" in capsys.readouterr().err


def test_files_of_no_known_name_are_named(tmp_path):
    for name in ("a_flair", "a_t1ce", "a_gado", "a_t2", "a_seg"):
        write(tmp_path / "anna" / f"{name}.nii.gz", VOLUME[..., 0])
    note = "not used, as their names do not say what they are: a_gado.nii.gz; name each"
    assert any(note in said for said in find_case(tmp_path / "anna").notes)
    (source,) = list_cohort(tmp_path, ["flair=*_flair.nii.gz", "post=*_gado.nii.gz"])
    assert not any("not used" in said for said in source.open().notes)


def test_a_mixed_cohort_may_lack_sequences_and_masks(tmp_path):
    words = ["flair=*_f.nii.gz", "pre=*_a.nii.gz", "post=*_c.nii.gz", "mask=*_m.nii.gz"]
    for name, letters in (("anna", "facm"), ("bert", "fc"), ("carl", "f")):
        for letter in letters:
            voxels = MASK if letter == "m" else VOLUME[..., "fac".index(letter)]
            write(tmp_path / name / f"{name}_{letter}.nii.gz", voxels)
    anna, bert, carl = (source.open() for source in list_cohort(tmp_path, words))
    assert anna.masks and not bert.masks and not carl.masks
    assert [case.replaced for case in (anna, bert, carl)] == [
        [],
        ["pre-contrast"],
        ["pre-contrast", "post-contrast"],
    ]
    with pytest.raises(ValueError, match="no file in its folders matches post=\\*_z"):
        list_cohort(tmp_path, ["flair=*_f.nii.gz", "post=*_z.nii.gz"])


def test_folders_of_patients_are_read_as_the_message_says(tmp_path):
    for scan in ("p1/2014-03-02", "p1/2015-03-02", "p2/2014-03-02"):
        write(tmp_path / scan / "flair.nii.gz", VOLUME[..., 0])
    with pytest.raises(ValueError, match="p1, p2 and so on hold them: .* --sequences"):
        list_cases(tmp_path)
    cases = list_cohort(tmp_path, ["flair=flair.nii.gz"])
    assert [patient_of(case) for case in cases] == ["p1", "p1", "p2"]


def test_channels_are_those_of_one_file(tmp_path):
    for name, channel in (("flair", 0), ("t1", 1)):
        write(tmp_path / "anna" / f"{name}.nii.gz", VOLUME[..., channel])
    (source,) = list_cohort(tmp_path, channels=[2])
    with pytest.raises(ValueError, match="flair.nii.gz: its case has several files; leave out"):
        source.open().read()


@pytest.mark.parametrize("above", ["kaggle_3m", "lgg-mri-segmentation/kaggle_3m"])
def test_one_folder_too_high_names_the_folder_of_the_cases(tmp_path, above):
    for case in ("TCGA_CS_4941_19960909", "TCGA_CS_4942_19970222"):
        folder = tmp_path / "archive" / above / case
        folder.mkdir(parents=True)
        image = SimpleITK.GetImageFromArray(MASK[0] * 255)
        SimpleITK.WriteImage(image, str(folder / f"{case}_1.tif"))
    with pytest.raises(ValueError, match=f"archive/{above} holds them: give that folder"):
        list_cases(tmp_path / "archive")


@pytest.mark.parametrize("channels", [1, 4])
def test_numbers_that_masks_have_too_are_of_cases(tmp_path, channels):
    """A Decathlon whose cases end with four digits, as the channels of nnU-Net do."""
    for case in range(4):
        voxels = VOLUME if channels == 4 else VOLUME[..., 0]
        write(tmp_path / "imagesTr" / f"head_{case:04d}.nii.gz", voxels)
        write(tmp_path / "labelsTr" / f"head_{case:04d}.nii.gz", MASK)
    names = {
        number: name for number, name in DECATHLON["modality"].items() if int(number) < channels
    }
    (tmp_path / "dataset.json").write_text(json.dumps({"modality": names}))
    names, volume, _ = as_read(tmp_path)
    assert names == [f"head_{case:04d}" for case in range(4)]
    assert sorted(volume[..., 1].ravel()) == sorted(VOLUME[..., 0].ravel())


def test_numbers_after_the_last_channel_are_asked_about(tmp_path):
    write_nnunet(tmp_path, {"channel_names": {"0": "FLAIR"}})
    with pytest.raises(ValueError, match="head_0_0003.nii.gz is of channel 3 by its name"):
        list_cases(tmp_path)


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
@pytest.mark.parametrize("make", [write_nnunet, write_decathlon])
def test_two_files_of_one_case_are_refused(tmp_path, folder, make):
    make(tmp_path)
    path = min(path for path in (tmp_path / folder).iterdir() if path.name[0] != ".")
    write(path.with_suffix(""), MASK)
    with pytest.raises(ValueError, match=r"\.nii and .*\.nii\.gz have the same case name"):
        list_cases(tmp_path)


def test_a_case_may_lack_a_channel(tmp_path, capsys):
    write_nnunet(tmp_path, cases=3)
    (tmp_path / "imagesTr" / "head_1_0001.nii.gz").unlink()
    (tmp_path / "imagesTr" / "head_2_0000.nii.gz").unlink()
    first, no_pre, no_flair = list_cases(tmp_path)
    assert first.open().replaced == [] and no_pre.open().replaced == ["pre-contrast"]
    with pytest.raises(ValueError, match="head_2 has no FLAIR; add its file"):
        no_flair.open()


def test_dataset_json_of_a_windows_editor(tmp_path):
    write_nnunet(tmp_path, None)
    (tmp_path / "dataset.json").write_text(json.dumps(NNUNET), encoding="utf-8-sig")
    assert len(list_cases(tmp_path)) == 2


@pytest.mark.parametrize("make", [write_nnunet, write_decathlon])
def test_labels_are_no_cases_without_a_description(tmp_path, make):
    make(tmp_path)
    (tmp_path / "dataset.json").unlink()
    if make is write_nnunet:
        with pytest.raises(ValueError, match="no dataset.json beside it says which is FLAIR"):
            list_cases(tmp_path)
    _, volume, mask = as_read(tmp_path, channels=(1, 0, 2))
    assert (mask == (volume[..., 1] > 700)).all()
