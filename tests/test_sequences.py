"""Test sequences on other grids, moved heads, oblong pixels and DICOM studies."""

from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK
from test_scan import edit, infer, read, write, write_series

from brainseg.io.grid import Grid
from brainseg.io.layouts import find_case, find_cases, list_cases
from brainseg.io.opening import find_sequences
from brainseg.io.registration import foreground_points, register, resample
from brainseg.io.scans import registered
from brainseg.metrics import dsc
from brainseg.phantom import make_volume
from brainseg.preprocess import preprocess
from brainseg.segmenter import Segmenter

SPACED = np.diag([-3.0, -3.0, 6.0, 1.0])


@pytest.fixture(scope="module")
def head() -> tuple[np.ndarray, np.ndarray]:
    return make_volume(3, 24, 64)


def image_of(sequence: np.ndarray) -> SimpleITK.Image:
    """Put a sequence (S, H, W) on the grid of SPACED."""
    grid = Grid(sequence.shape[::-1], (3.0, 3.0, 6.0), (0.0, 0.0, 0.0), np.eye(3))
    return grid.image(np.ascontiguousarray(sequence.transpose(2, 1, 0)))


# Other grids


def test_other_grids_are_resampled_to_flair(head, weights, tmp_path, capsys):
    volume = head[0]
    flair = write(tmp_path / "f.nii.gz", volume[..., 1], "RAS", affine=SPACED)
    pre = write(tmp_path / "p.nii.gz", volume[..., 0], "ASR", affine=SPACED)
    fewer = SPACED.copy()
    fewer[2, 2] = 12.0
    post = write(tmp_path / "c.nii.gz", volume[::2, ..., 2], affine=fewer)
    scan = find_sequences(flair, pre, post)
    got = scan.read()
    assert np.array_equal(got[..., 1], volume[..., 1])
    np.testing.assert_allclose(got[..., 0], volume[..., 0], atol=1e-3)
    np.testing.assert_allclose(got[::2, ..., 2], volume[::2, ..., 2], atol=1e-3)
    between = volume[:-2:2, ..., 2].astype(float) / 2 + volume[2::2, ..., 2] / 2.0
    np.testing.assert_allclose(got[1:-1:2, ..., 2], between, atol=1e-3)
    assert infer(tmp_path / "out", weights, "--flair", flair, "--pre", pre, "--post", post) == 0
    said = capsys.readouterr().err
    assert "post-contrast is on a different grid from FLAIR (64 x 64 x 12 voxels" in said
    mask, affine = read(tmp_path / "out" / f"{scan.name}_mask.nii.gz")
    assert mask.shape == read(flair)[0].shape and mask.any()
    np.testing.assert_allclose(affine, read(flair)[1], atol=1e-4)


def test_a_sequence_in_another_space_is_refused(head, weights, tmp_path, capsys):
    flair = write(tmp_path / "f.nii.gz", head[0][..., 1], affine=SPACED)
    far = SPACED.copy()
    far[0, 3] = 150
    post = write(tmp_path / "c.nii.gz", head[0][..., 2], affine=far)
    assert infer(tmp_path / "out", weights, "--flair", flair, "--post", post) == 1
    assert f"error: {post}: covers " in capsys.readouterr().err


def test_a_mask_on_another_grid_is_refused(head, tmp_path):
    flair = write(tmp_path / "f.nii.gz", head[0][..., 1], affine=SPACED)
    mask = write(tmp_path / "f_mask.nii.gz", head[1][:-1].astype("u1"), affine=SPACED)
    with pytest.raises(ValueError, match=f"{mask}: 64 x 64 x 23 voxels, but f.nii.gz has"):
        find_sequences(flair, None, None).read_pair()


# Registration


def test_a_moved_head_is_brought_back(head, weights, tmp_path, capsys):
    volume = head[0]
    moved = SimpleITK.VersorRigid3DTransform()
    moved.SetRotation((0.4, 0.4, 0.82), np.deg2rad(8))
    moved.SetTranslation((4.0, -3.5, 2.5))
    moved.SetCenter((96.0, 96.0, 72.0))
    fixed, post = image_of(volume[..., 1]), image_of(volume[..., 2])
    grid = Grid(post.GetSize(), post.GetSpacing(), post.GetOrigin(), np.eye(3))
    paths = [tmp_path / f"{name}.nii.gz" for name in "fc"]
    for path, image in zip(paths, (fixed, grid.image(resample(post, grid, moved))), strict=True):
        SimpleITK.WriteImage(image, str(path))
    found = register(SimpleITK.ReadImage(str(paths[1])), fixed, paths[1])
    places = foreground_points(fixed)
    back = [moved.TransformPoint(found.transform.TransformPoint(p)) for p in places.tolist()]
    assert np.linalg.norm(np.array(back) - places, axis=1).mean() < 1.5
    assert found.angle == pytest.approx(8, abs=1) and found.after > found.before
    options = "--flair", paths[0], "--post", paths[1], "--register"
    assert infer(tmp_path / "out", weights, *options) == 0
    assert f"post-contrast was registered to FLAIR: {found}" in capsys.readouterr().err, "seeded"


def test_a_sequence_that_does_not_fit_is_not_registered(head, weights, tmp_path, capsys):
    rng = np.random.default_rng(0)
    flair = write(tmp_path / "f.nii.gz", head[0][..., 1], affine=SPACED)
    noise = rng.integers(0, 255, head[1].shape, dtype=np.uint8)
    post = write(tmp_path / "c.nii.gz", noise, affine=SPACED)
    options = "--flair", flair, "--post", post, "--register"
    assert infer(tmp_path / "out", weights, *options) == 1
    assert f"error: {post}: cannot be registered to FLAIR" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.nii.gz"))


@pytest.mark.parametrize("off", [90, 133, 300])
def test_a_header_far_off_is_registered(head, tmp_path, off):
    """Millimetres to where the header says that the head is are no movement of the head."""
    flair = write(tmp_path / "f.nii.gz", head[0][..., 1], affine=SPACED)
    far = SPACED.copy()
    far[0, 3] += off
    post = write(tmp_path / "c.nii.gz", head[0][..., 2], affine=far)
    scan = registered(find_sequences(flair, None, post))
    assert scan.movements[post].distance == pytest.approx(off, abs=1)
    assert np.abs(scan.read()[..., 2] - head[0][..., 2].astype(float)).mean() < 1


def test_slices_cannot_be_registered(phantoms, weights, tmp_path, capsys):
    assert infer(tmp_path / "out", weights, "--images", phantoms, "--register") == 1
    assert "holds every sequence and cannot be registered" in capsys.readouterr().err


# Oblong pixels


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("rows", [True, False])
def test_oblong_pixels_become_square(head, version, rows):
    volume = head[0].repeat(4, axis=1).repeat(4, axis=2)
    half = volume[:, ::2] if rows else volume[:, :, ::2]
    expected, _ = preprocess(volume, 64, version)
    images, frame = preprocess(half, 64, version, aspect=2.0 if rows else 0.5)
    assert images.shape == expected.shape and frame.shape == half.shape[:3]
    assert (images - expected).abs().mean() < 0.06


def test_a_mask_of_oblong_pixels_is_on_their_grid(head, weights, tmp_path, capsys):
    """Scans of sagittal or coronal slices have such pixels."""
    volume, _ = head
    affine = SPACED.copy()
    affine[1, 1] *= 2
    source = write(tmp_path / "a.nii.gz", volume[:, ::2], "PIL", affine=affine)
    assert infer(tmp_path / "out", weights, "--images", source) == 0
    assert "a: its axial pixels are 6.0 x 3.0 mm; they are resampled" in capsys.readouterr().err
    mask, found = read(tmp_path / "out" / "a_mask.nii.gz")
    np.testing.assert_allclose(found, read(source)[1], atol=1e-4)
    assert mask.shape == read(source)[0].shape[:3]
    axial = find_case(source).grid.to_axial(mask[..., None])[..., 0] > 0
    whole = Segmenter.from_weights(weights)(volume)
    assert dsc(axial, whole[:, ::2]) > 0.8


def test_extremely_oblong_pixels_are_refused(head, tmp_path):
    affine = np.diag([-0.1, -3.0, 6.0, 1.0])
    with pytest.raises(ValueError, match="its axial pixels are 3.0 x 0.1 mm; correct its header"):
        find_case(write(tmp_path / "a.nii.gz", head[0], affine=affine))


# DICOM studies

FLAIR = {"SeriesDescription": "AX T2 FLAIR", "EchoTime": 120, "InversionTime": 2300}
BEFORE = {"SeriesDescription": "AX T1 SE", "EchoTime": 12}
AFTER = {"SeriesDescription": "AX T1 SE", "EchoTime": 12, "ContrastBolusAgent": "Gadovist"}
T2 = {"SeriesDescription": "AX T2 TSE", "EchoTime": 95}


def write_study(folder: Path, volume: np.ndarray, *series: dict) -> Path:
    """Write a folder of series, each with the next sequence of the volume."""
    for k, tags in enumerate(series):
        tags = {"SeriesNumber": k, "PatientID": "p1"} | tags
        write_series(folder / f"s{k}", volume[..., k % 3], f"1.2.{k + 3}", **tags)
    return folder


def flatten(study: Path) -> Path:
    for path in sorted(study.glob("*/*")):
        path.rename(study / f"{path.parent.name}{path.name}")
    for folder in study.glob("s?"):
        folder.rmdir()
    return study


@pytest.mark.parametrize("flat", [False, True])
def test_a_study_is_sorted_into_sequences(head, weights, tmp_path, capsys, flat):
    volume = head[0][:5]
    study = write_study(tmp_path / "anna", volume, BEFORE, FLAIR, AFTER, T2)
    study = flatten(study) if flat else study
    assert [source.name for source in list_cases(study)] == ["anna"]
    (scan,) = find_cases(tmp_path)
    assert np.array_equal(scan.read(), volume)
    assert infer(tmp_path / "out", weights, "--images", study) == 0
    said = capsys.readouterr().err
    assert (
        "anna: pre-contrast is 'AX T1 SE', FLAIR is 'AX T2 FLAIR', post-contrast is 'AX T1 SE'; "
        "left out: 'AX T2 TSE'" in said
    )
    check_grid_by_pydicom(scan.folder, tmp_path / "out" / "anna_mask.nii.gz")


def check_grid_by_pydicom(series: Path, mask: Path) -> None:
    """Check independently that pydicom and nibabel agree on the first and last slice."""
    folder = series if series.is_dir() else series.parent
    slices = [pydicom.dcmread(path) for path in sorted(folder.iterdir())]
    slices = [one for one in slices if one.SeriesDescription == FLAIR["SeriesDescription"]]
    image = nibabel.load(mask)
    assert image.shape == (slices[0].Columns, slices[0].Rows, len(slices))
    heights = sorted((float(one.ImagePositionPatient[2]), one) for one in slices)
    for k in (0, len(slices) - 1):
        one = heights[k][1]
        corner = np.array(one.ImagePositionPatient, float)
        across, down = np.reshape(np.array(one.ImageOrientationPatient, float), (2, 3))
        far = corner + across * one.PixelSpacing[1] * 10 + down * one.PixelSpacing[0] * 20
        for place, index in ((corner, (0, 0, k)), (far, (10, 20, k))):
            there = nibabel.affines.apply_affine(image.affine, index) * (-1, -1, 1)
            np.testing.assert_allclose(there, place, atol=1e-3)


@pytest.mark.parametrize(
    "series, said",
    [
        ((FLAIR, FLAIR, BEFORE), "2 FLAIR series"),
        ((BEFORE, AFTER), "no FLAIR series"),
        ((FLAIR | {"EchoTime": 12}, BEFORE), "no FLAIR series"),
    ],
)
def test_a_study_whose_flair_is_in_doubt_is_refused(head, weights, tmp_path, series, said, capsys):
    study = write_study(tmp_path / "anna", head[0][:4], *series)
    assert infer(tmp_path / "out", weights, "--images", study) == 1
    text = capsys.readouterr().err
    assert f"{study}: {said}; name the right one with --flair SERIES" in text
    assert all(f"s{k} = {tags['SeriesDescription']!r} (4 images" in text
               for k, tags in enumerate(series))  # fmt: skip


NAMELESS = {"SeriesDescription": "", "ProtocolName": ""}


@pytest.mark.parametrize(
    "series, used",
    [
        ((FLAIR, AFTER, AFTER), {}),
        ((FLAIR, BEFORE | {"EchoTime": 100}), {}),
        ((FLAIR, BEFORE, BEFORE, AFTER), {"post-contrast": "s3"}),
        ((FLAIR, BEFORE, AFTER | {"SeriesDescription": "T1 pre"}), {"pre-contrast": "s1"}),
        ((FLAIR | NAMELESS, BEFORE | NAMELESS, T2 | NAMELESS), {}),
    ],
)
def test_doubt_about_t1_leaves_flair(head, tmp_path, series, used):
    """FLAIR of a study without descriptions is certain by its times, T1 is not."""
    study = write_study(tmp_path / "anna", head[0][:4], *series)
    scan = find_case(study)
    assert scan.flair.name == "s0"
    assert {name: path.name for name, path in scan.others.items()} == used
    said = " ".join(scan.notes)
    assert "not certain which T1 each is: " in said
    assert "name them with --flair, --pre and --post" in said
    assert "FLAIR stands in for" in said


def test_sequences_of_two_patients_are_refused(head, weights, tmp_path):
    study = write_study(tmp_path / "anna", head[0][:4], BEFORE, FLAIR)
    for path in (study / "s0").iterdir():
        edit(path, PatientID="p2")
    message = infer(tmp_path / "out", weights, "--flair", study / "s1", "--pre", study / "s0")
    assert "s0: PatientID 'p2', but s1 has 'p1'; give sequences of one patient" in message


def test_other_frames_of_reference_are_reported(head, tmp_path):
    study = write_study(tmp_path / "anna", head[0][:4], BEFORE, FLAIR)
    said = []
    for frame in ("1.2.8", "1.2.9"):
        for path in study.glob("*/*"):
            edit(path, FrameOfReferenceUID=frame if path.parent.name == "s0" else "1.2.9")
        said.append([note for note in find_case(study).notes if "FrameOfReferenceUID" in note])
    ((note,), none) = said
    assert note.startswith("pre-contrast has a different FrameOfReferenceUID from FLAIR")
    assert not none


def test_folders_of_several_studies_are_cases(head, tmp_path):
    for name in ("anna", "bert"):
        study = f"1.{len(name)}.{ord(name[0])}"
        write_series(tmp_path / name, head[0][:4, ..., 1], StudyInstanceUID=study)
    assert [source.name for source in list_cases(tmp_path)] == ["anna", "bert"]
