"""Two scans of one head in one frame: the axial one of the first, which the other was moved to."""

from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from .io.formats import read_voxels
from .io.pictures import to_grey
from .io.registration import interpolate, like
from .io.scans import Scan
from .io.slices import Case

NEAR = 5.0  # mm: a component has a partner if the other mask comes as near to its box
LEAST_ML = 0.2  # of a component that needs a partner


@dataclass(frozen=True)
class Measured:
    """A case that was segmented: its mask (S, H, W) and its row of volumes.csv."""

    case: Case
    mask: np.ndarray
    row: dict
    flair: np.ndarray | None = None  # (S, H, W); None: in the case's file


def read_flair(measured: Measured) -> sitk.Image | None:
    """Read FLAIR as an axial image; None if the files of the case state no positions."""
    case = measured.case
    if not isinstance(case, Scan):
        return None
    flair = measured.flair
    if flair is None:
        voxels = case.grid.to_axial(case.pick(read_voxels(case.flair)))
        flair = np.ascontiguousarray(voxels[..., voxels.shape[-1] // 2])
    return case.grid.axial.image(flair.T)


def at_place(
    measured: Measured, moving: sitk.Image, fixed: sitk.Image, transform: sitk.Transform, place: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return a scan and its mask, (H, W), in the slice `place` of the first one."""
    one_slice = fixed[:, :, place : place + 1]
    shades = like(moving, to_grey(sitk.GetArrayFromImage(moving)[..., None]))
    grey = interpolate(shades, one_slice, transform)
    mask = interpolate(like(moving, measured.mask), one_slice, transform) > 0.5
    return grey[0].astype(np.uint8), mask[0]


def components_alone(
    first: Measured, later: Measured, moving: sitk.Image, transform: sitk.Transform
) -> list[str]:
    """Say which components of one mask have no partner in the other, in the first scan's frame."""
    assert isinstance(first.case, Scan)
    grid = first.case.grid.axial
    moved = interpolate(like(moving, later.mask), grid.blank, transform) > 0.5
    spacing = np.array(grid.spacing[::-1])
    said = []
    pairs = (later, moved, first.mask), (first, first.mask, moved)
    for scan, mask, other in pairs:
        for ml in _without_partner(mask, other, spacing):
            said.append(f"{scan.case.name}: a component of {ml:.1f} ml without a partner")
    return said


def _without_partner(mask: np.ndarray, other: np.ndarray, spacing: np.ndarray) -> list[float]:
    """Return the volumes, in ml, of the components of a mask that are far from another mask."""
    from skimage.measure import label, regionprops  # slow to import

    margin = np.ceil(NEAR / spacing).astype(int)
    volumes = []
    for component in regionprops(np.asarray(label(mask))):
        start = np.maximum(np.array(component.bbox[:3]) - margin, 0)
        end = np.array(component.bbox[3:]) + margin
        near = other[start[0] : end[0], start[1] : end[1], start[2] : end[2]].any()
        ml = float(component.area * spacing.prod() / 1000)
        if not near and ml >= LEAST_ML:
            volumes.append(ml)
    return volumes
