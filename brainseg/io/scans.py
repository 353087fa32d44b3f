"""Scans as hospitals keep them: NIfTI, MetaImage, NRRD and DICOM.

The network was trained on axial slices whose columns run to the patient's left, whose rows run to
the posterior, and whose numbers run upward. The header tells how to turn a scan of any other
orientation that way. Sequences on other grids are resampled to FLAIR's; the mask is on FLAIR's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import ClassVar

import numpy as np

from .dicom import File, Series, series_or_file, text
from .files import MARK, by
from .formats import read_grid, read_voxels, scan_name
from .grid import Grid
from .itk import voxel_file
from .nifti import is_nifti, write_nifti
from .registration import Movement, register, resample
from .sequences import SEQUENCES, contradiction, with_copies
from .slices import Case

MOST_ASPECT = 10.0  # of pixels: more is a damaged header
LEAST_COVERED = 0.5  # of FLAIR's field of view; less is another head, or another space


@dataclass(frozen=True)
class Scan(Case):
    """A case of volume files: `slices` is one, or pre-contrast, FLAIR and post-contrast.

    A single-channel file is FLAIR, which also stands in for missing sequences. `masks` is empty or
    one file on FLAIR's grid. With `register`, the other sequences are moved to where they fit FLAIR
    best.
    """

    mask_name: ClassVar[str] = "<scan>_mask.nii.gz"
    slices: tuple[File, ...]
    grid: Grid  # FLAIR's
    channels: int  # of FLAIR's file
    register: bool = False
    chosen: str = ""  # which series of a study are used, or which files of a folder are not

    @classmethod
    def open(
        cls, name: str, files: Sequence[File | None], mask: Path | None = None, chosen: str = ""
    ) -> Scan:
        """Open the scan in one file, or in pre-contrast, FLAIR, post-contrast; reads no voxels.

        FLAIR stands in for None. A DICOM series may be given as its folder or one of its files.
        Raises ValueError, naming the file, for an implausible header or a different patient.
        """
        flair = files[len(files) // 2]
        assert flair is not None
        flair = series_or_file(flair)
        slices = [series_or_file(file) if file else flair for file in files]
        grid, channels = read_grid(flair)
        numbers = tuple(range(1, grid.shape[grid.axes[2]] + 1))
        masks = (mask,) if mask else ()
        scan = cls(name, numbers, tuple(slices), masks, grid, channels, chosen=chosen)
        if not 1 / MOST_ASPECT <= scan.aspect <= MOST_ASPECT:
            raise ValueError(f"{flair}: its axial pixels are {_pixels(scan)}; correct its header")
        for file in scan.others.values():
            _check_patient(file, flair)
        return scan

    @property
    def flair(self) -> File:
        return self.slices[len(self.slices) // 2]

    @property
    def folder(self) -> Path:
        return self.flair.path if isinstance(self.flair, Series) else self.flair

    @property
    def patient_id(self) -> str:
        return self.flair.patient if isinstance(self.flair, Series) else ""

    @property
    def files(self) -> list[Path]:
        return list(chain.from_iterable(map(_files_of, self.slices + self.masks)))

    @property
    def spacing(self) -> tuple[float, float, float]:
        x, y, z = self.grid.axes
        return self.grid.spacing[z], self.grid.spacing[y], self.grid.spacing[x]

    @property
    def others(self) -> dict[str, File]:
        """Return the files of the sequences other than FLAIR, by sequence name."""
        if len(self.slices) == 1:
            return {}
        pairs = zip(SEQUENCES, self.slices, strict=True)
        return {name: file for name, file in pairs if file != self.flair}

    @property
    def replaced(self) -> list[str]:
        if self.channels > 1:
            return _copies(self.picked)
        return [name for name in SEQUENCES if name not in ("FLAIR", *self.others)]

    @cached_property
    def notes(self) -> list[str]:
        return _notes_on(self)

    @cached_property
    def movements(self) -> dict[File, Movement]:
        """Register each other sequence to FLAIR; raises ValueError if one does not fit."""
        fixed = self.grid.image(_one_channel(self.flair))
        movements = {}
        for file in self.others.values():
            grid, _ = read_grid(file)
            movements[file] = register(grid.image(_one_channel(file)), fixed, file)
        return movements

    def read(self) -> np.ndarray:
        """Read the volume (S, H, W, C); raises ValueError, naming the file, if one is unusable."""
        if len(self.slices) == 1:
            voxels = self.pick(read_voxels(self.flair))
        elif self.picked:
            raise ValueError(f"{self.folder}: its case has several files; leave out --channels")
        else:
            sequences = {file: _on_grid_of_flair(self, file) for file in dict.fromkeys(self.slices)}
            files = self.slices if len(sequences) > 1 else [self.flair]
            voxels = np.stack([sequences[file] for file in files], axis=3)
        return with_copies(np.ascontiguousarray(self.grid.to_axial(voxels)), 3)

    def read_mask(self) -> np.ndarray:
        """Read the mask (S, H, W), bool: true wherever the mask file holds a lesion label."""
        (path,) = self.masks
        grid, _ = read_grid(path)
        grid.axial.check_same(path, self.grid.axial, self.folder)  # its axes may be in other order
        voxels = read_voxels(path)
        # A cubic resize swings a little below 0.
        if voxels.shape[3] > 1 or voxels.min() < -0.2 * voxels.max():
            raise ValueError(f"{path}: is not a mask; give one channel, 0 outside the lesion")
        mask = grid.to_axial(voxels)[..., 0]
        return np.ascontiguousarray(self.labels.lesion(mask, self.name, path))

    def write_map(self, path: Path, values: np.ndarray, mark: str = MARK) -> None:
        """Write values (S, H, W), bool as 0 and 1, on the scan's grid; `mark`: what made them."""
        if values.dtype == bool:
            values = values.view(np.uint8)
        voxels = np.ascontiguousarray(self.grid.to_file_axes(values))
        write_nifti(path, voxels, self.grid, self.folder, mark)


def _copies(picked: tuple[int, ...]) -> list[str]:
    """List the sequences for which the channel of FLAIR is used."""
    if not picked:
        return []
    flair = picked[len(picked) // 2]
    channels = picked if len(picked) == len(SEQUENCES) else (flair,) * len(SEQUENCES)
    pairs = zip(SEQUENCES, channels, strict=True)
    return [name for name, channel in pairs if name != "FLAIR" and channel == flair]


def _pixels(scan: Scan) -> str:
    _, height, width = scan.spacing
    return f"{height:.1f} x {width:.1f} mm"


def _files_of(file: File) -> list[Path]:
    """List the files that hold a volume: one, a header and its voxels, or a series."""
    if isinstance(file, Series):
        return list(file.files)
    voxels = None if is_nifti(file) else voxel_file(file)
    return [file, voxels] if voxels else [file]


def _notes_on(scan: Scan) -> list[str]:
    """Say what the user should know about how a scan is read, a sentence each."""
    notes = list(scan.doubts)
    if scan.chosen:
        notes.append(scan.chosen)
    if scan.replaced:
        notes.append(f"FLAIR stands in for {' and '.join(scan.replaced)}")
    notes += scan.grid.notes
    if scan.aspect != 1:
        notes.append(
            f"its axial pixels are {_pixels(scan)}; they are resampled to square ones for the "
            "network, and the mask back to FLAIR's grid"
        )
    for name, file in scan.others.items():
        grid, _ = read_grid(file)
        notes += [f"{name}: {note}" for note in grid.notes]
        if scan.register:
            notes.append(f"{name} was registered to FLAIR: {scan.movements[file]}")
            continue
        one, other = _both(file, scan.flair, "FrameOfReferenceUID")
        if one and other and one != other:
            notes.append(
                f"{name} has a different FrameOfReferenceUID from FLAIR: if the head moved "
                "between them, use --register"
            )
        if grid.difference(scan.grid):
            spacing = by(f"{length:.2g}" for length in grid.spacing)
            notes.append(
                f"{name} is on a different grid from FLAIR ({by(grid.shape)} voxels of "
                f"{spacing} mm); it is resampled to FLAIR's"
            )
    return notes


def _on_grid_of_flair(scan: Scan, file: File) -> np.ndarray:
    """Read voxels (X, Y, Z) of a sequence, on FLAIR's grid."""
    voxels = _one_channel(file)
    if file == scan.flair:
        return voxels
    grid, _ = read_grid(file)
    if scan.register:
        return resample(grid.image(voxels), scan.grid, scan.movements[file].transform)
    if not grid.difference(scan.grid):
        return voxels
    covered = scan.grid.coverage(grid)
    if covered < LEAST_COVERED:
        raise ValueError(
            f"{file}: covers {covered:.0%} of {scan.folder.name} by its header; if it is of "
            "another session, use --register"
        )
    return resample(grid.image(voxels), scan.grid)


def _one_channel(file: File) -> np.ndarray:
    """Read voxels (X, Y, Z) of a file of one channel; raises ValueError for more."""
    voxels = read_voxels(file)
    if voxels.shape[3] > 1:
        raise ValueError(f"{file}: {voxels.shape[3]} channels; give it alone, with --images")
    return voxels[..., 0]


def registered(case: Case) -> Scan:
    """Return the case with its sequences registered to FLAIR; ValueError if they share files."""
    if not isinstance(case, Scan) or case.channels > 1:
        raise ValueError(
            f"{case.folder}: holds every sequence and cannot be registered; give one volume file "
            "per sequence, or do not ask to register"
        )
    return replace(case, register=True)


def _check_patient(file: File, flair: File) -> None:
    """Raise ValueError if two DICOM series name different patients."""
    one, other = _both(file, flair, "PatientID")
    if one != other:
        raise ValueError(
            f"{file}: PatientID {one!r}, but {flair.name} has {other!r}; give sequences of one "
            "patient"
        )


def _both(one: File, other: File, name: str) -> tuple[str, str]:
    """Return a field of two DICOM series; two empty texts unless both are series."""
    if not (isinstance(one, Series) and isinstance(other, Series)):
        return "", ""
    return text(one.header, name), text(other.header, name)


def with_doubts(scan: Scan) -> Scan:
    """Doubt the sequences that are another one by their name, or by their DICOM header."""
    doubts = []
    for role, file in zip(SEQUENCES, scan.slices, strict=True):
        if role != "FLAIR" and file == scan.flair:
            continue
        words = file.words if isinstance(file, Series) else scan_name(file)
        wrong = contradiction(role, words)
        if wrong:
            doubts.append(f"{role} is {file.name}, which says {wrong!r}: check the order")
        elif role == "FLAIR" and isinstance(file, Series) and not file.may_be_flair:
            doubts.append(f"{role} is {file.summary(file.path)}, which may be another sequence")
    return replace(scan, doubts=tuple(doubts))
