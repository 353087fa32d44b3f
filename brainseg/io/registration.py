"""Rigid registration of one sequence to another of the same head, and resampling to a grid."""

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import SimpleITK as sitk

from ..fill import without_fill
from .dicom import File
from .grid import Grid
from .quiet import WhileUsed

PIXEL = 1.5  # millimetres: finer pixels are binned before registration
SAMPLES = 20_000  # voxels of FLAIR that the metric samples
ITERATIONS = 100
LEAST = 0.15  # nats; two sequences of one head share 0.4 to 1, noise and a head under 0.1
WORSE = 0.95  # of the start's mutual information: less is a failure, from here to 1 a tie
FARTHEST = 80.0  # millimetres from the start; a head cannot move farther in a head coil


@dataclass(frozen=True)
class Movement:
    """The movement that fits a sequence to FLAIR."""

    transform: sitk.Transform  # from FLAIR's space to the sequence's
    before: float  # mutual information in nats, at the start
    after: float
    distance: float  # millimetres that the head's voxels moved, on average
    angle: float  # degrees

    def __str__(self) -> str:
        return (
            f"moved by {self.distance:.1f} mm and turned by {self.angle:.1f} degrees, mutual "
            f"information {self.after:.3f} ({self.before:.3f} before)"
        )


@WhileUsed
def one_thread(undo: ExitStack) -> None:
    """Let ITK compute with one thread: sums of several differ from run to run."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    undo.callback(sitk.ProcessObject.SetGlobalDefaultNumberOfThreads, before)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)


@one_thread
def register(moving: sitk.Image, fixed: sitk.Image, path: File) -> Movement:
    """Find the rigid movement that makes `moving`, read from `path`, fit `fixed`.

    Maximises Mattes mutual information (https://doi.org/10.1109/TMI.2003.809072) from where the
    header puts `moving`, or from aligned centres. Raises ValueError if it does not converge, is too
    far, too dissimilar or worse than the start; a start that fits as well is kept.
    """
    moving, fixed = _prepare(moving), _prepare(fixed)
    head = foreground_points(fixed)
    start = sitk.Euler3DTransform()
    start.SetCenter(head.mean(axis=0).tolist())
    method = _method(fixed)

    def fit(transform: sitk.Transform) -> float:
        method.SetInitialTransform(transform, inPlace=False)
        return -method.MetricEvaluate(fixed, moving)

    try:
        if Grid.of(fixed).coverage(Grid.of(moving)) < 0.5 or fit(start) < LEAST:
            start = sitk.Euler3DTransform(sitk.CenteredTransformInitializer(fixed, moving, start))
        before = fit(start)
        best = sitk.CompositeTransform(method.Execute(fixed, moving)).GetBackTransform()
        best = sitk.Euler3DTransform(best)
        after = fit(best)
    except RuntimeError as error:  # too few samples inside, or one value everywhere
        raise ValueError(_failed(path, "the two have nothing in common")) from error
    movement = _movement(best, before, after, head)
    if method.GetOptimizerIteration() >= ITERATIONS:
        raise ValueError(_failed(path, f"it did not converge in {ITERATIONS} steps"))
    if not max(before, after) >= LEAST or _distance(start, best, head) > FARTHEST:
        raise ValueError(_failed(path, f"the result does not fit ({movement})"))
    if after < WORSE * before:
        raise ValueError(_failed(path, f"the result fits worse than the start ({movement})"))
    if after <= before:  # registered already
        return _movement(start, before, before, head)
    return movement


def _distance(one: sitk.Transform, other: sitk.Transform, head: np.ndarray) -> float:
    """Return how far apart two transforms put the head, in mm, on average."""
    pairs = [(one.TransformPoint(place), other.TransformPoint(place)) for place in head.tolist()]
    return float(np.linalg.norm(np.diff(pairs, axis=1), axis=2).mean())


def _movement(
    transform: sitk.Euler3DTransform, before: float, after: float, head: np.ndarray
) -> Movement:
    distance = _distance(sitk.Transform(), transform, head)
    turn = np.reshape(transform.GetMatrix(), (3, 3))
    angle = float(np.degrees(np.arccos(np.clip((np.trace(turn) - 1) / 2, -1, 1))))
    return Movement(transform, before, after, distance, angle)


def _failed(path: File, reason: str) -> str:
    return f"{path}: cannot be registered to FLAIR: {reason}; check it, or leave out --register"


def _method(fixed: sitk.Image) -> sitk.ImageRegistrationMethod:
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(numberOfHistogramBins=32)
    method.SetMetricSamplingStrategy(method.RANDOM)
    share = min(1.0, SAMPLES / fixed.GetNumberOfPixels())
    method.SetMetricSamplingPercentage(share, seed=1)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(
        learningRate=2.0, minStep=0.02, numberOfIterations=ITERATIONS, relaxationFactor=0.6
    )
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([1, 1, 1])  # slices are few: smooth, but leave none out
    method.SetSmoothingSigmasPerLevel([4, 2, 0])  # millimetres
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    return method


def _prepare(image: sitk.Image) -> sitk.Image:
    """Return the image in float32, without fill, with finer pixels binned to about PIXEL."""
    factors = [max(1, round(PIXEL / length)) for length in image.GetSpacing()]
    scanned, _ = without_fill(sitk.GetArrayFromImage(image))
    return sitk.BinShrink(like(image, scanned), factors)


def foreground_points(image: sitk.Image) -> np.ndarray:
    """Return the positions (N, 3), in mm, of a sample of foreground voxels."""
    voxels = sitk.GetArrayViewFromImage(image)
    index = np.argwhere(voxels > voxels.mean())
    if len(index) == 0:
        index = np.array(voxels.shape)[None] // 2
    index = index[:: max(1, len(index) // 500)]
    return np.array([image.TransformIndexToPhysicalPoint(i) for i in index[:, ::-1].tolist()])


def resample(moving: sitk.Image, grid: Grid, transform: sitk.Transform | None = None) -> np.ndarray:
    """Resample an image linearly to a grid: voxels (X, Y, Z), float32, where fill is not mixed."""
    voxels = sitk.GetArrayFromImage(moving)
    scanned, fill = without_fill(voxels)
    transform = transform or sitk.Transform(3, sitk.sitkIdentity)
    moved = interpolate(like(moving, scanned), grid.blank, transform, float(scanned.min()))
    if fill:
        filled = np.isin(voxels, fill)
        share = interpolate(like(moving, filled), grid.blank, transform, float(filled.min()))
        moved[share > 0.5] = fill[0]
    return moved.T


def interpolate(
    image: sitk.Image, reference: sitk.Image, transform: sitk.Transform, outside: float = 0.0
) -> np.ndarray:
    """Interpolate an image linearly on the grid of another: voxels (Z, Y, X)."""
    moved = sitk.Resample(image, reference, transform, sitk.sitkLinear, outside)
    return sitk.GetArrayFromImage(moved)


def like(image: sitk.Image, voxels: np.ndarray) -> sitk.Image:
    """Put voxels (Z, Y, X), as float32, on the grid of an image."""
    changed = sitk.GetImageFromArray(voxels.astype(np.float32))
    changed.CopyInformation(image)
    return changed
