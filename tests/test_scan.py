"""Test volume files of any orientation: the network's voxels, and the mask's way back."""

import itertools
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
import torch
from conftest import file_limit, run_main
from medpy.io import load, save
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

import inference
from brainseg.io.grid import Grid
from brainseg.io.layouts import find_case, find_cases, list_cases
from brainseg.io.opening import find_sequences
from brainseg.io.scans import Scan, read_voxels
from brainseg.patients import patient_named
from brainseg.phantom import make_volume, write_data_set
from brainseg.preprocess import preprocess
from brainseg.segmenter import Segmenter
from dataset import BrainSegmentationDataset

# From voxels (column, row, slice), which run left, posterior and up, to RAS: negated twice.
LPS = np.diag([-0.9, -0.9, 5.0, 1.0])
LPS[:3, 3] = 110.0, 120.0, -30.0
# The directions of a file's axes, in nibabel's notation.
ORIENTATIONS = ["LPS", "RAS", "LAS", "ASR", "PIL", "SLP"]


def write(path: Path, volume: np.ndarray, orientation: str = "LPS", affine=LPS) -> Path:
    """Write a volume (S, H, W[, C]) as a NIfTI file whose axes run along `orientation`."""
    voxels = volume.transpose(2, 1, 0, *range(3, volume.ndim))
    image = nibabel.Nifti1Image(voxels, affine)
    ours = nibabel.orientations.axcodes2ornt("LPS")
    wanted = nibabel.orientations.axcodes2ornt(orientation)
    image = image.as_reoriented(nibabel.orientations.ornt_transform(ours, wanted))
    assert "".join(nibabel.aff2axcodes(image.affine)) == orientation
    nibabel.save(image, path)
    return path


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read voxels and affine with nibabel."""
    image = nibabel.load(path)
    return np.asanyarray(image.dataobj), image.affine


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Make a phantom with three different sides: 7 slices of 60 x 52."""
    volume, truth = make_volume(3, 7, 60)
    return volume[:, :, 4:56], truth[:, :, 4:56]


def infer(out: Path, weights: Path, *more: object) -> object:
    words = ["--weights", weights, "--predictions", out, "--figure", out / "dsc.png", *more]
    return run_main(inference.main, *words, "--device", "cpu")


# The way there and back


@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_every_orientation_gives_the_same_voxels(pair, tmp_path, orientation):
    scan = find_case(write(tmp_path / "a.nii.gz", pair[0], orientation))
    assert np.array_equal(scan.read(), pair[0])
    assert scan.numbers == tuple(range(1, 8))
    assert scan.spacing == pytest.approx((5.0, 0.9, 0.9))


@pytest.mark.parametrize("orientation", ["RAS", "PIL"])
def test_mask_lies_on_the_grid_of_the_scan(pair, weights, tmp_path, orientation):
    """Check independently: nibabel reads the same affine and the same voxels from both files."""
    volume, _ = pair
    source = write(tmp_path / "a.nii.gz", volume, orientation)
    assert infer(tmp_path / "out", weights, "--images", source) == 0
    mask, affine = read(tmp_path / "out" / "a_mask.nii.gz")
    voxels, expected = read(source)
    np.testing.assert_allclose(affine, expected, atol=1e-4)
    assert mask.shape == voxels.shape[:3] and set(np.unique(mask)) == {0, 1}
    truth = write(
        tmp_path / "direct.nii.gz",
        Segmenter.from_weights(weights)(volume).astype("u1"),
        orientation,
    )
    assert np.array_equal(mask, read(truth)[0]), "as the network marks the slices themselves"


def test_all_48_orientations_come_back():
    voxels = np.arange(2 * 3 * 4).reshape(2, 3, 4, 1)
    seen = set()
    for axes in itertools.permutations(range(3)):
        for signs in itertools.product((-1, 1), repeat=3):
            direction = np.zeros((3, 3))
            direction[axes, range(3)] = signs
            grid = Grid(voxels.shape[:3], (1, 1, 1), (0, 0, 0), direction)
            axial = grid.to_axial(voxels)
            seen.add(axial.tobytes() + bytes(axial.shape))
            assert np.array_equal(grid.to_file_axes(axial[..., 0]), voxels[..., 0])
    assert len(seen) == 48


def test_oblique_scan_goes_to_the_nearest_axes(pair, tmp_path):
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    path = tmp_path / "oblique.nii.gz"
    nibabel.save(nibabel.Nifti1Image(pair[0][..., 1].transpose(2, 1, 0), turn @ LPS), path)
    scan = find_case(path)
    assert np.array_equal(scan.read()[..., 1], pair[0][..., 1])
    scan.write_map(tmp_path / "mask.nii.gz", pair[1])
    np.testing.assert_allclose(read(tmp_path / "mask.nii.gz")[1], turn @ LPS, atol=1e-4)


@pytest.mark.parametrize("suffix", [".nii", ".mha", ".nrrd"])
def test_other_formats(pair, tmp_path, suffix):
    voxels, header = load(str(write(tmp_path / "a.nii.gz", pair[0][..., 1], "RAS")))
    save(voxels, str(tmp_path / f"b{suffix}"), header)
    assert np.array_equal(find_case(tmp_path / f"b{suffix}").read()[..., 1], pair[0][..., 1])


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", ["b.mha", "b.mhd"])
def test_a_metaimage_that_is_cut_short_is_one_sentence(tmp_path, name, compressed, capfd):
    voxels = np.random.default_rng(0).integers(0, 255, (6, 40, 40), np.uint8)
    SimpleITK.WriteImage(
        SimpleITK.GetImageFromArray(voxels), str(tmp_path / name), useCompression=compressed
    )
    assert read_voxels(tmp_path / name).shape == (40, 40, 6, 1)
    data = next((p for p in tmp_path.iterdir() if p.suffix in (".raw", ".zraw")), tmp_path / name)
    data.write_bytes(data.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{name}: .* cut short"):
        read_voxels(tmp_path / name)
    assert capfd.readouterr().err == "", "nothing of the reader's own"


@pytest.mark.parametrize("suffix", [".mhd", ".nrrd"])
def test_the_file_with_the_voxels_is_one_of_the_case(pair, tmp_path, suffix):
    """The cache of preprocessed volumes must notice that it changed."""
    header, volume = tmp_path / f"b{suffix}", pair[0][..., 1]
    header.write_text(
        "NDims = 3\nDimSize = 4 4 2\nElementSpacing = 1 1 1\nTransformMatrix = 1 0 0 0 1 0 0 0 1\n"
        "Offset = 0 0 0\nElementType = MET_UCHAR\n\nElementDataFile\t= other.bin\n"
        if suffix == ".mhd"
        else "NRRD0004\ntype: uchar\ndimension: 3\nsizes: 4 4 2\nencoding: raw\n"
        "space: left-posterior-superior\nspace directions: (1,0,0) (0,1,0) (0,0,1)\n"
        "space origin: (0,0,0)\ndata file: other.bin\n"
    )
    (tmp_path / "other.bin").write_bytes(volume.tobytes()[:32])
    (case,) = find_cases(header)
    assert case.read().shape == (2, 4, 4, 3)
    assert case.files == [header, tmp_path / "other.bin"]


def test_a_volume_of_vectors_in_time_is_refused(tmp_path):
    image = SimpleITK.GetImageFromArray(np.ones((2, 3, 4, 5, 3), np.uint8), isVector=True)
    SimpleITK.WriteImage(image, str(tmp_path / "a.nii.gz"))
    with pytest.raises(ValueError, match="a.nii.gz: has 5 axes"):
        find_cases(tmp_path)


def test_a_link_keeps_its_name(pair, tmp_path):
    """In a data set under git-annex, each file is a link to one that is named by its hash."""
    for name in ("annex", "in"):
        (tmp_path / name).mkdir()
    target = write(tmp_path / "annex" / "MD5E-s123--0a1b.nii.gz", pair[0][..., 1])
    link = tmp_path / "in" / "TCGA_CS_4941_19960909_flair.nii.gz"
    link.symlink_to(target)
    write(tmp_path / "in" / "TCGA_CS_4941_19960909_flair_mask.nii.gz", pair[1].astype("u1"))
    for case in (*find_cases(link), *find_cases(link.parent)):
        assert case.name == "TCGA_CS_4941_19960909_flair" and case.masks
    link.rename(link.with_name("x_t1.nii.gz"))
    with pytest.raises(ValueError, match="its name says 't1'"):
        find_cases(link.with_name("x_t1.nii.gz"))


def test_a_metaimage_without_its_voxels_names_their_file(tmp_path):
    image = SimpleITK.GetImageFromArray(np.ones((2, 8, 8), np.uint8))
    SimpleITK.WriteImage(image, str(tmp_path / "b.mhd"))
    (tmp_path / "b.raw").unlink()
    with pytest.raises(ValueError, match="b.mhd: its voxels, b.raw, are not beside it"):
        read_voxels(tmp_path / "b.mhd")


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8"])
@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nifti_that_is_not_finite_is_refused(tmp_path, name, dtype, value):
    """The reader of ITK turns such a voxel into 0."""
    voxels = np.random.default_rng(0).random((5, 7, 3)).astype(dtype)
    header = nibabel.Nifti1Header(endianness=dtype[0])
    header.set_data_dtype(dtype)
    for place in (None, (0, 0, 0), (4, 6, 2)):
        if place:
            voxels[place] = value
        nibabel.save(nibabel.Nifti1Image(voxels, LPS, header), tmp_path / name)
        if place is None:
            assert np.allclose(read_voxels(tmp_path / name)[..., 0], voxels)
            continue
        with pytest.raises(ValueError, match=f"{name}: holds NaN or infinite voxels"):
            read_voxels(tmp_path / name)
        voxels[place] = 0


@pytest.mark.parametrize("dtype", "i1 u1 i2 u2 i4 u4 i8 u8 f4 f8".split())
@pytest.mark.parametrize("order", "<>")
def test_nifti_voxels_are_those_of_itk(tmp_path, dtype, order):
    """The masks of earlier versions came from these: the same values, in the same data type."""
    voxels = (np.random.default_rng(0).random((4, 3, 2)) * 100).astype(order + dtype)
    image = nibabel.Nifti1Image(voxels, LPS, dtype=voxels.dtype)
    content = image.to_bytes()
    header = nibabel.Nifti1Header(content[:348], check=False).as_byteswapped(order)
    content = content[348:352] + voxels.tobytes("F")
    for slope, inter in ((1, 0), (0, 0), (np.nan, np.nan), (0.37, 5.5), (-2, 1), (3, np.nan)):
        header["scl_slope"], header["scl_inter"] = slope, inter
        (tmp_path / "a.nii").write_bytes(header.binaryblock + content)
        array = read_voxels(tmp_path / "a.nii")[..., 0].T
        expected = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(tmp_path / "a.nii"))
        assert array.dtype == expected.dtype and np.array_equal(array, expected)


def test_the_patient_of_sequences_is_known_by_their_folder(pair, tmp_path):
    """Otherwise a patient that the weights were trained on would count as unseen."""
    (tmp_path / "anna_20240131").mkdir()
    flair = write(tmp_path / "anna_20240131" / "flair.nii.gz", pair[0][..., 1])
    assert patient_named(find_sequences(flair, None, None).name) == "anna"


# Sequences


def test_flair_alone_stands_in_for_the_missing_sequences(pair, tmp_path):
    volume = find_case(write(tmp_path / "flair.nii.gz", pair[0][..., 1])).read()
    assert all(np.array_equal(volume[..., k], pair[0][..., 1]) for k in range(3))
    assert volume.strides[3] == 0, "once in memory"
    images, _ = preprocess(volume, 32)
    assert images.stride(1) == 0


def test_sequences_in_separate_files(pair, weights, tmp_path):
    paths = [write(tmp_path / f"{n}.nii.gz", pair[0][..., k], "ASR") for k, n in enumerate("abc")]
    together = write(tmp_path / "all.nii.gz", pair[0], "ASR")
    options = "--pre", paths[0], "--flair", paths[1], "--post", paths[2]
    assert infer(tmp_path / "out", weights, *options) == 0
    assert infer(tmp_path / "out", weights, "--images", together) == 0
    names = f"{tmp_path.name}_b", "all"
    one, other = (read(tmp_path / "out" / f"{name}_mask.nii.gz")[0] for name in names)
    assert np.array_equal(one, other) and one.any()
    volume = Scan.open("b", [paths[1], paths[1], paths[2]]).read()
    assert np.array_equal(volume, pair[0][..., [1, 1, 2]])


def test_sequences_replaced_by_flair_are_reported(pair, weights, tmp_path, capsys):
    pre, flair, post = (
        write(tmp_path / f"{k}.nii.gz", pair[0][..., n]) for n, k in enumerate("pfc")
    )
    both = "FLAIR stands in for pre-contrast and post-contrast"
    assert find_sequences(flair, None, None).notes == [both]
    assert find_sequences(flair, pre, None).notes == ["FLAIR stands in for post-contrast"]
    assert find_sequences(flair, None, post).notes == ["FLAIR stands in for pre-contrast"]
    assert find_sequences(flair, pre, post).notes == []
    for option in ("--flair", "--images"):
        assert infer(tmp_path / "out", weights, option, flair) == 0
        assert f"f: {both}\n" in capsys.readouterr().err


def test_mask_beside_flair_is_its_truth(pair, weights, tmp_path):
    flair = write(tmp_path / "flair.nii.gz", pair[0][..., 1])
    write(tmp_path / "flair_mask.nii.gz", pair[1].astype("u1"))
    assert infer(tmp_path / "out", weights, "--flair", flair) == 0
    assert (tmp_path / "out" / "metrics.csv").read_text().count("\n") == 2


def test_flair_with_three_channels_is_refused(pair, weights, tmp_path, capsys):
    path = write(tmp_path / "all.nii.gz", pair[0])
    assert infer(tmp_path / "out", weights, "--flair", path) == 1
    assert f"{path}: 3 channels; give it alone, with --images" in capsys.readouterr().err


OTHERS = "p1_t1 p1-T1ce x_seg a_t2w t1ce p3_T2_axial DWI_b1000 p5_ADC_map".split()


@pytest.mark.parametrize("name", [*OTHERS, "p8 T1 MPRAGE"])
def test_a_file_named_as_another_sequence_is_not_flair(pair, tmp_path, name):
    path = write(tmp_path / f"{name}.nii.gz", pair[0][..., 1])
    with pytest.raises(
        ValueError, match=f"{path}: its one channel would be used as FLAIR.*--flair"
    ):
        find_case(path)
    path.unlink()
    assert find_case(write(tmp_path / f"{name}.nii.gz", pair[0])).channels == 3


# Headers that cannot be trusted


@pytest.mark.parametrize("limit", [0, 100])
def test_full_disk_keeps_the_earlier_mask(pair, tmp_path, limit):
    scan = find_case(write(tmp_path / "a.nii.gz", pair[0]))
    scan.write_map(tmp_path / "mask.nii.gz", pair[1])
    before = (tmp_path / "mask.nii.gz").read_bytes()
    with file_limit(limit), pytest.raises(OSError, match="too large: .*mask.nii.gz"):
        scan.write_map(tmp_path / "mask.nii.gz", ~pair[1])
    assert (tmp_path / "mask.nii.gz").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.nii.gz", "mask.nii.gz"]


@pytest.mark.parametrize("kind", ["one-hot", "negative"])
def test_anything_but_a_mask_is_refused(pair, tmp_path, kind):
    write(tmp_path / "a.nii.gz", pair[0])
    mask = np.stack([~pair[1], pair[1]], axis=-1).astype("u1")
    mask = mask if kind == "one-hot" else mask[..., 1].astype("i2") * 2 - 1
    path = write(tmp_path / "a_mask.nii.gz", mask)
    with pytest.raises(ValueError, match=f"{path}: is not a mask"):
        find_case(tmp_path / "a.nii.gz").read_pair()


# Folders, masks, training


def test_a_folder_of_volume_files_with_their_masks(pair, weights, tmp_path):
    (tmp_path / "in").mkdir()
    for name, orientation in (("a", "RAS"), ("b", "ASR")):
        write(tmp_path / "in" / f"{name}.nii.gz", pair[0], orientation)
        write(tmp_path / "in" / f"{name}_mask.nii.gz", pair[1].astype("u1"), orientation)
    cases = find_cases(tmp_path / "in")
    assert [case.name for case in cases] == ["a", "b"]
    for case in cases:
        volume, truth = case.read_pair()
        assert np.array_equal(volume, pair[0]) and np.array_equal(truth, pair[1])
    assert infer(tmp_path / "out", weights, "--images", tmp_path / "in") == 0
    header, *lines = (tmp_path / "out" / "metrics.csv").read_text().splitlines()
    assert "hd95_mm" in header
    row = dict(zip(header.split(","), lines[0].split(","), strict=True))
    assert float(row["lesion_ml"]) == pytest.approx(pair[1].sum() * 5 * 0.9 * 0.9 / 1000, rel=1e-4)
    assert [line.split(",", 1)[0] for line in lines] == ["a", "b"]
    first, second = (dict(zip(header.split(","), line.split(","), strict=True)) for line in lines)
    for name in ("case", "patient"):
        assert (first.pop(name), second.pop(name)) == ("a", "b")
    assert first == second, "one scan in two orientations"


def test_finished_scans_are_skipped(pair, weights, tmp_path, capsys):
    source = write(tmp_path / "a.nii.gz", pair[0])
    out = tmp_path / "out"
    assert infer(out, weights, "--images", source) == 0
    before = (out / "a_mask.nii.gz").stat().st_mtime_ns
    assert infer(out, weights, "--images", source, "--skip-existing") == 0
    assert (out / "a_mask.nii.gz").stat().st_mtime_ns == before
    whole = (out / "a_mask.nii.gz").read_bytes()
    (out / "a_mask.nii.gz").write_bytes(whole[:-10])
    assert infer(out, weights, "--images", source, "--skip-existing") == 0
    assert (out / "a_mask.nii.gz").read_bytes() == whole, "a damaged mask is made anew"


def test_a_case_folder_may_hold_a_volume_file(pair, tmp_path):
    (tmp_path / "patient_7").mkdir()
    write(tmp_path / "patient_7" / "scan.nii.gz", pair[0])
    (case,) = find_cases(tmp_path)
    assert case.name == "patient_7" and np.array_equal(case.read(), pair[0])
    write(tmp_path / "patient_7" / "scan2.nii.gz", pair[0])
    with pytest.raises(ValueError, match="scan.nii.gz and scan2.nii.gz.*--flair"):
        find_cases(tmp_path)


def test_results_are_never_written_beside_the_sources(pair, weights, tmp_path):
    """The predicted mask would be taken for the true one, or overwrite it."""
    path = write(tmp_path / "x.nii.gz", pair[0])
    write(tmp_path / "x_mask.nii.gz", pair[1].astype("u1"))
    before = (tmp_path / "x_mask.nii.gz").read_bytes()
    for options in (("--images", tmp_path), ("--images", path)):
        said = infer(tmp_path, weights, *options)
        assert "is a source" in said and "name another folder with --predictions" in said
    flair = write(tmp_path / "flair.nii.gz", pair[0][..., 1])
    assert "is a source" in infer(tmp_path, weights, "--flair", flair)
    (tmp_path / "scans").mkdir()
    write_data_set(tmp_path / "data", cases=1, slices=4, size=48)
    (tmp_path / "scans" / "phantom_000").symlink_to(tmp_path / "data" / "phantom_000")
    scan = tmp_path / "scans" / "phantom_000"
    assert "is a source" in infer(tmp_path / "scans", weights, "--images", scan)
    assert (tmp_path / "x_mask.nii.gz").read_bytes() == before


def test_predictions_among_the_sources_are_not_cases(pair, weights, tmp_path, capsys):
    (tmp_path / "p1").mkdir()
    write(tmp_path / "p1" / "scan.nii.gz", pair[0])
    for _ in range(2):
        assert infer(tmp_path / "predictions", weights, "--images", tmp_path) == 0
        assert "1 of 1 cases" in capsys.readouterr().out


def test_two_cases_of_one_name_are_refused(pair, tmp_path):
    write(tmp_path / "a.nii.gz", pair[0])
    shutil.copy(tmp_path / "a.nii.gz", tmp_path / "a.nii")
    with pytest.raises(ValueError, match="a.nii and a.nii.gz have the same case name"):
        list_cases(tmp_path)


def test_slices_and_a_volume_in_one_folder_are_refused(phantoms, pair, tmp_path):
    shutil.copytree(phantoms / "phantom_004", tmp_path / "p")
    write(tmp_path / "p" / "stray.nii.gz", pair[0])
    with pytest.raises(ValueError, match="holds slices and stray.nii.gz"):
        find_case(tmp_path / "p")


def test_suffixes_in_capitals(pair, tmp_path):
    write(tmp_path / "a.nii", pair[0]).rename(tmp_path / "A.NII")
    write(tmp_path / "a_mask.nii", pair[1].astype("u1")).rename(tmp_path / "A_Mask.NII")
    (case,) = find_cases(tmp_path)
    assert case.name == "A" and np.array_equal(case.read_pair()[1], pair[1])


def test_finding_scans_reads_no_voxel(pair, tmp_path, monkeypatch):
    write(tmp_path / "a.nii.gz", pair[0])
    monkeypatch.setattr("brainseg.io.scans.read_voxels", None)
    (case,) = find_cases(tmp_path)
    assert len(case.numbers) == 7


def test_training_reads_volume_files_too(pair, tmp_path):
    write(tmp_path / "in.nii.gz", pair[0], "RAS")
    write(tmp_path / "in_mask.nii.gz", pair[1].astype("u1"), "RAS")
    data = BrainSegmentationDataset(tmp_path, "all", 32, cache=tmp_path / "cache")
    assert len(data) == 7 and data.locate(3) == ("in", 4)
    assert np.array_equal(data.volumes[0].truth, pair[1])


# DICOM


def write_series(folder: Path, flair: np.ndarray, series: str = "1.2.3", **tags: object) -> Path:
    """Write axial slices (S, H, W) as a DICOM series, upward, its files in another order."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, image in enumerate(flair):
        meta = FileMetaDataset()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        meta.MediaStorageSOPClassUID = MRImageStorage
        meta.MediaStorageSOPInstanceUID = f"{series}.{k + 1}"
        data = pydicom.Dataset()
        data.file_meta = meta
        data.SOPClassUID, data.SOPInstanceUID = MRImageStorage, f"{series}.{k + 1}"
        data.StudyInstanceUID, data.SeriesInstanceUID = "1.2", series
        data.Modality, data.InstanceNumber = "MR", k + 1
        data.Rows, data.Columns = image.shape
        data.PixelSpacing, data.SliceThickness = [0.9, 0.9], 5
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]  # columns to the left, rows to the back
        data.ImagePositionPatient = [-110, -120, -30 + 5 * k]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
        data.PixelData = image.astype("<u2").tobytes()
        for name, value in tags.items():
            setattr(data, name, value)
        data.save_as(folder / f"IM{(7 * k) % 11:03d}", enforce_file_format=True)
    return folder


@pytest.mark.parametrize(
    "of_t1", [{"EchoTime": 10}, {"SeriesNumber": 4}, {"SeriesDescription": "t1"}], ids=str
)
def test_two_sequences_in_one_series_are_refused(pair, tmp_path, of_t1):
    """Once, T1 between the slices of FLAIR made a small mask, with a high expected DSC."""
    stated = {"EchoTime": 120, "SeriesNumber": 3, "SeriesDescription": "flair"}
    write_series(tmp_path / "s", pair[0][..., 1], **stated)
    write_series(tmp_path / "t1", pair[0][..., 0], **stated | of_t1)
    for k, path in enumerate(sorted((tmp_path / "t1").iterdir())):
        header = pydicom.dcmread(path)
        header.ImagePositionPatient[2] += 2.5
        header.SOPInstanceUID = f"1.2.3.4.{k}"
        header.save_as(tmp_path / "s" / f"T{k}")
    (tag,) = of_t1
    with pytest.raises(ValueError, match=f"has {tag} .* give each image a folder"):
        find_case(tmp_path / "s").read()


def test_dicom_series_goes_the_whole_way(pair, weights, tmp_path):
    flair = pair[0][..., 1]
    series = write_series(tmp_path / "series", flair)
    scan = find_case(series)
    assert np.array_equal(scan.read()[..., 1], flair) and scan.spacing == pytest.approx(
        (5, 0.9, 0.9)
    )
    assert infer(tmp_path / "out", weights, "--images", series) == 0
    mask, affine = read(tmp_path / "out" / "series_mask.nii.gz")
    np.testing.assert_allclose(affine, LPS, atol=1e-4)
    expected = Segmenter.from_weights(weights)(np.repeat(flair[..., None], 3, axis=3))
    assert np.array_equal(mask.transpose(2, 1, 0) > 0, expected) and expected.any()
    assert [path.name for path in list_cases(tmp_path)] == ["series"], "predictions are no case"


def test_dicom_folder_by_a_relative_path(pair, tmp_path, monkeypatch):
    monkeypatch.chdir(write_series(tmp_path / "series", pair[0][..., 1]))
    assert [case.name for case in find_cases(".")] == ["series"]
    for given in (Path("IM010"), Path(".")):
        assert len(find_sequences(given, None, None).numbers) == 7


def edit(path: Path, **tags: object) -> None:
    data = pydicom.dcmread(path)
    for name, value in tags.items():
        setattr(data, name, value)
    data.save_as(path)


@pytest.mark.parametrize("fault", ["gap", "twice", "plane", "mosaic"])
def test_series_that_is_not_a_regular_stack_is_refused(pair, tmp_path, fault):
    """ITK only warns and returns slices at wrong positions."""
    series = write_series(tmp_path / "series", pair[0][..., 1])
    path = series / "IM003"  # the fourth of seven slices has another number: see write_series
    if fault == "gap":
        path.unlink()
    elif fault == "twice":
        edit(path, ImagePositionPatient=[-110, -120, -30])
    elif fault == "plane":
        edit(path, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    else:
        edit(path, ImageType=["ORIGINAL", "PRIMARY", "M", "MOSAIC"])
    with pytest.raises(
        ValueError, match=f"{series}: .*(missing|have one Image|ImageOrientationPatient|mosaic)"
    ):
        find_case(series)


def test_rewritten_dicom_is_not_served_from_the_cache(pair, tmp_path):
    series = write_series(tmp_path / "in" / "series", pair[0][..., 1])
    find_case(series).write_map(tmp_path / "in" / "series_mask.nii.gz", pair[1])

    def first_slice() -> torch.Tensor:
        data = BrainSegmentationDataset(tmp_path / "in", "all", 32, cache=tmp_path / "cache")
        return data[3][0]

    before = first_slice()
    path = series / "IM010"  # slice 4 of 7
    edit(path, PixelData=(60000 - pair[0][3, ..., 1].astype("<u2")).tobytes())
    assert not torch.equal(first_slice(), before)


def test_a_dicomdir_is_not_a_series(pair, tmp_path):
    series = write_series(tmp_path / "cd" / "series", pair[0][..., 1])
    shutil.copy(next(series.iterdir()), tmp_path / "cd" / "DICOMDIR")
    assert [case.name for case in find_cases(tmp_path / "cd")] == ["series"]


# Refusals


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd"])
@pytest.mark.parametrize("kept", [0, 100, 9000, -60])
def test_damaged_file_is_refused_by_name(pair, tmp_path, kept, suffix):
    """NIfTI readers fill what is missing with zeros; ours must refuse the file."""
    path = tmp_path / f"a{suffix}"
    if suffix == ".nrrd":
        voxels, header = load(str(write(tmp_path / "b.nii.gz", pair[0][..., 1])))
        save(voxels, str(path), header)
    else:
        write(path, pair[0])
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"^{path}: not a readable volume"):
        find_case(path).read()


def test_file_of_another_kind_is_refused(tmp_path, weights):
    (tmp_path / "notes.txt").write_text("hello")
    said = infer(tmp_path / "o", weights, "--images", tmp_path / "notes.txt")
    assert "is not a volume file" in said


def test_missing_flair_is_refused(tmp_path, weights):
    message = infer(tmp_path / "out", weights, "--flair", tmp_path / "none.nii.gz")
    assert message == f"error: {tmp_path / 'none.nii.gz'}: no such file"


def test_pre_and_post_need_flair(tmp_path, weights):
    assert infer(tmp_path / "out", weights, "--post", tmp_path / "none.nii.gz") == 2


# What is not what it seems


@pytest.mark.parametrize(
    "tags, said",
    [
        ({"Modality": "CT"}, "of modality CT"),
        ({"SeriesDescription": "AX T1 POST GD", "EchoTime": 9}, "'AX T1 POST GD'"),
        ({"SeriesDescription": "AX T2 TSE", "EchoTime": 90}, "'AX T2 TSE'"),
        ({"SeriesDescription": "ADC"}, "'ADC'"),
        ({"EchoTime": 9}, "TE 9"),
    ],
    ids=str,
)
def test_a_lone_series_of_another_kind_is_not_taken_for_flair(pair, tmp_path, tags, said):
    folder = write_series(tmp_path / "p1", pair[0][..., 1], **tags)
    with pytest.raises(ValueError, match=said) as error:
        find_case(folder)
    assert str(folder) in str(error.value)
    assert find_sequences(folder, None, None).channels == 1, "unless it is given as FLAIR"


def test_a_lone_series_is_named(pair, tmp_path):
    tags = {"SeriesDescription": "AX T2 FLAIR", "EchoTime": 120, "InversionTime": 2500}
    folder = write_series(tmp_path / "p1", pair[0][..., 1], **tags)
    assert "FLAIR is 'AX T2 FLAIR'" in find_case(folder).notes


@pytest.mark.parametrize("left", [0, 1000])
def test_a_damaged_file_at_the_end_of_a_series_is_not_left_out(pair, tmp_path, left):
    folder = write_series(tmp_path / "p1", pair[0][..., 1])
    last = max(folder.iterdir(), key=lambda f: pydicom.dcmread(f).ImagePositionPatient[2])
    last.write_bytes(last.read_bytes()[:left])
    with pytest.raises(ValueError, match=f"{last}: not a readable DICOM image"):
        find_case(folder)


def test_dicom_beside_other_cases_hides_none(pair, tmp_path):
    flair = pair[0][..., 1]
    write_series(tmp_path / "a", flair)
    write(tmp_path / "a" / "flair.nii.gz", flair)
    with pytest.raises(ValueError, match="a: holds DICOM files and flair.nii.gz"):
        find_case(tmp_path / "a")
    write_series(tmp_path / "b", flair)
    (tmp_path / "b" / "p1").mkdir()
    write(tmp_path / "b" / "p1" / "flair.nii.gz", flair)
    with pytest.raises(ValueError, match="b: holds DICOM files beside the case p1"):
        list_cases(tmp_path / "b")


def test_a_study_beside_volume_files_is_listed(pair, tmp_path):
    write(tmp_path / "a.nii.gz", pair[0][..., 1])
    for k in (1, 2):
        write_series(tmp_path / "b" / f"s{k}", pair[0][..., 1], f"1.2.{k}")
    assert [source.name for source in list_cases(tmp_path)] == ["a", "b"]


@pytest.mark.parametrize("name", ["p3_T2_FLAIR", "anna-t2f", "scan1", "pre_op_scan"])
def test_files_that_may_be_flair_are_not(pair, tmp_path, name):
    assert find_case(write(tmp_path / f"{name}.nii.gz", pair[0][..., 1])).name == name


@pytest.mark.parametrize("name", ["flair_brain", "p1_bet"])
def test_the_mask_of_a_brain_extraction_is_no_truth(pair, tmp_path, name):
    write(tmp_path / f"{name}_mask.nii.gz", (pair[0][..., 1] > 40).astype(np.uint8))
    assert not find_case(write(tmp_path / f"{name}.nii.gz", pair[0][..., 1])).masks


def test_a_name_that_is_not_utf8_is_refused(pair, tmp_path):
    path = write(tmp_path / "a.nii.gz", pair[0][..., 1])
    path.rename(tmp_path / "😀 a\udcff.nii.gz")
    with pytest.raises(ValueError, match="its name is not UTF-8"):
        list_cases(tmp_path)


def test_the_sform_counts_to_the_far_corner(tmp_path):
    affine, sform = np.diag([-0.5, -0.5, 1, 1.0]), np.diag([-0.509, -0.509, 1, 1.0])
    image = nibabel.Nifti1Image(np.zeros((512, 512, 3), np.uint8), affine)
    image.set_qform(affine, 1)
    image.set_sform(sform, 2)
    nibabel.save(image, tmp_path / "a.nii.gz")
    scan = find_case(tmp_path / "a.nii.gz")
    assert scan.grid.spacing[:2] == pytest.approx((0.509, 0.509))
    assert scan.notes[-1] == "its sform and qform disagree; the sform is used"
