"""Test the files for the page's viewer: aligned with the scan, and small."""

import numpy as np
import pytest
import SimpleITK

from brainseg.io.pictures import to_grey
from brainseg.io.scans import Scan
from brainseg.io.slices import Case
from brainseg.phantom import make_volume
from brainseg.segmenter import Segmentation
from server.viewer import SIDE, viewer_files


@pytest.fixture(scope="module")
def phantom():
    return make_volume(0, slices=8, size=64)


def shown_of(case, volume, probabilities, mask, truth) -> dict:
    segmentation = Segmentation(mask, probabilities, None, {}, None, [])
    return viewer_files(case, volume, to_grey(volume), segmentation, truth)


def opened(folder, content: bytes) -> SimpleITK.Image:
    (folder / "shown.nii.gz").write_bytes(content)
    return SimpleITK.ReadImage(str(folder / "shown.nii.gz"))


def test_files_lie_where_the_scan_lies(phantom, tmp_path):
    """Use an oblique scan whose axes are permuted and reversed."""
    volume, mask = phantom
    image = SimpleITK.GetImageFromArray(volume, isVector=True)
    image.SetSpacing((1.5, 1.25, 4))
    image.SetOrigin((10, -20, 30))
    c, s = np.cos(0.2), np.sin(0.2)
    image.SetDirection((c, -s, 0, s, c, 0, 0, 0, 1))
    image = SimpleITK.Flip(SimpleITK.PermuteAxes(image, (2, 0, 1)), (True, False, True))
    SimpleITK.WriteImage(image, str(tmp_path / "scan.nii.gz"))
    case = Scan.open("scan", [tmp_path / "scan.nii.gz"])
    shown = shown_of(case, case.read(), mask * 0.5, mask, ~mask)

    probability = opened(tmp_path, shown["probability"])
    assert probability.GetSize() == (64, 64, 8)
    assert np.allclose(probability.GetSpacing(), (1.5, 1.25, 4))
    for index in ((0, 0, 0), (63, 0, 7), (30, 20, 3)):
        place = probability.TransformIndexToPhysicalPoint(index)
        voxel = image[image.TransformPhysicalPointToIndex(place)]
        assert voxel == tuple(volume[index[::-1]])
    seen = SimpleITK.GetArrayFromImage(probability) / 255
    assert np.allclose(seen, mask * 0.5, atol=1 / 255)
    labels = SimpleITK.GetArrayFromImage(opened(tmp_path, shown["labels"]))
    assert np.array_equal(labels, np.where(mask, 1, 2))
    left, back, up = shown["focus"] * np.array([-1, -1, 1])  # RAS to LPS
    x, y, z = probability.TransformPhysicalPointToIndex((left, back, up))
    assert z == mask.sum(axis=(1, 2)).argmax() and mask[z, y - 3 : y + 4, x - 3 : x + 4].any()


def test_slices_without_spacing_make_a_head(phantom, tmp_path):
    volume, mask = phantom
    case = Case("a", tuple(range(1, 9)), (), ())
    shown = shown_of(case, volume, mask.astype(float), mask, None)
    assert shown["sequences"] == ["flair", "pre", "post"] and shown["numbers"] == (*range(1, 9),)
    scan = opened(tmp_path, shown["scan"])
    assert scan.GetSize() == (64, 64, 8, 3)
    assert scan.GetSpacing()[:3] == pytest.approx((1, 1, 5.2)), "as high as a head"


def test_no_file_is_written(phantom, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", "/nowhere")  # a killed server would leave it
    volume, mask = phantom
    case = Case("a", tuple(range(1, 9)), (), ())
    assert shown_of(case, volume, mask.astype(float), mask, None)["scan"]


def test_a_copy_of_flair_is_not_sent(phantom, tmp_path):
    volume, mask = phantom
    case = Case("a", tuple(range(1, 9)), (), ())
    copied = np.concatenate((volume[..., [1, 1]], volume[..., [2]]), axis=3)
    assert shown_of(case, copied, mask, mask, None)["sequences"] == ["flair", "post"]
    single = shown_of(case, volume[..., [1]], mask, mask, None)
    assert single["sequences"] == ["flair"]


def test_large_scans_are_thinned_out(tmp_path):
    mask = np.zeros((3, SIDE + 2, 40), bool)
    mask[1, 200:220, 10:20] = True
    volume = np.where(mask, 200, 50).astype(np.uint8)[..., None]
    shown = shown_of(Case("a", (1, 2, 3), (), ()), volume, mask, mask, None)
    labels = opened(tmp_path, shown["labels"])
    assert labels.GetSize() == (40, SIDE // 2 + 1, 3)
    assert labels.GetSpacing()[1] == 2 and SimpleITK.GetArrayFromImage(labels).sum() == 100


def test_an_empty_mask_is_shown_from_the_middle(phantom):
    volume, mask = phantom
    empty = np.zeros_like(mask)
    shown = shown_of(Case("a", (*range(1, 9),), (), ()), volume, empty, empty, None)
    assert shown["focus"] == pytest.approx([-32, -32, 4 * 5.2])
