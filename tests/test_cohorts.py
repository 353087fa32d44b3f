"""Test cohorts in common layouts, with their labels, patients and bad cases."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK
from conftest import read_rows, run_main
from PIL import Image

import evaluate
import inference
import train
from brainseg.cache import prepare
from brainseg.io.labels import Labels
from brainseg.io.layouts import find_case, find_cases, list_cases
from brainseg.io.opening import parse_sequences
from brainseg.patients import patient_named, patient_of
from brainseg.phantom import make_volume
from brainseg.splits import SPLITS, list_cohort, subset_of, subset_of_patient
from brainseg.weights import read_card

VOLUMES = [make_volume((5, k), 4, 32) for k in range(4)]
ROLES = ("pre", "flair", "post")


@dataclass(frozen=True)
class Names:
    """Hold the name of the k-th case and the paths of the files of a case of that name."""

    case: str
    pre: str
    flair: str
    post: str
    mask: str
    others: tuple[str, ...] = ()  # files that are neither
    images: str = ""  # the folder to give as --images
    options: tuple[str, ...] = ()


def in_folder(case: str, stem: str, ends: str, others: str = "", **more) -> Names:
    """Build Names from the name ends of pre-contrast, FLAIR, post-contrast and mask."""
    files = [f"{{name}}/{stem}{end}.nii.gz" for end in ends.split()]
    return Names(case, *files, tuple(f"{{name}}/{stem}{o}.nii.gz" for o in others.split()), **more)


ANAT = "{subject}/{session}/anat/{name}"
LAYOUTS = {
    "BraTS 2023": in_folder("BraTS-GLI-{k:05d}-000", "{name}", "-t1n -t2f -t1c -seg", "-t2w"),
    "BraTS 2021": in_folder("BraTS2021_{k:05d}", "{name}", "_t1 _flair _t1ce _seg", "_t2"),
    "UCSF-PDGM": in_folder(
        "UCSF-PDGM-{k:04d}_nifti",
        "{patient}",
        "_T1 _FLAIR _T1c _tumor_segmentation",
        "_T1_bias _FLAIR_bias _T1c_bias _T2 _ADC _brain_segmentation _SWI",
    ),
    "UPENN-GBM": Names(
        "UPENN-GBM-{k:05d}_11",
        *(f"images_structural/{{name}}/{{name}}_{end}.nii.gz" for end in ("T1", "FLAIR", "T1GD")),
        "images_segm/{name}_segm.nii.gz",
        ("images_structural/{name}/{name}_T2.nii.gz",),
    ),
    "BIDS": Names(
        "sub-{k:02d}_ses-a",
        *(f"{ANAT}_{end}.nii.gz" for end in ("T1w", "FLAIR", "ce-gadolinium_T1w")),
        "derivatives/seg/{subject}/{session}/anat/{name}_label-lesion_mask.nii.gz",
        (
            f"{ANAT}_T2w.nii.gz",
            "derivatives/bet/{subject}/{session}/anat/{name}_desc-brain_mask.nii.gz",
        ),
    ),
    "any": Names(
        "case{k}",
        *(f"in/{{name}}/a/{{name}}_{end}.nii.gz" for end in "pfc"),
        "in/masks/{name}.nii.gz",
        images="in",
        options=(
            "--sequences", "flair=a/*_f.nii.gz", "pre=a/*_p.nii.gz", "post=a/*_c.nii.gz",
            "mask={root}/masks/{name}.nii.gz",
        ),
    ),
}  # fmt: skip


def write(path: Path, voxels: np.ndarray) -> Path:
    """Write a volume (S, H, W) as NIfTI, its axes to the left, the back and up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing((0.9, 0.9, 5.0))
    SimpleITK.WriteImage(image, str(path))
    return path


def place(template: str, name: str) -> str:
    subject, _, session = name.partition("_")
    patient = patient_named(name)
    return template.format(name=name, subject=subject, session=session, patient=patient)


def write_case(root: Path, names: Names, name: str, volume: np.ndarray, mask: np.ndarray) -> None:
    for channel, role in enumerate(ROLES):
        write(root / place(getattr(names, role), name), volume[..., channel])
    write(root / place(names.mask, name), mask.astype(np.uint8))
    for other in names.others:
        write(root / place(other, name), np.full_like(volume[..., 0], 7))


def write_cohort(root: Path, names: Names) -> list[str]:
    """Write three cases to train and validate on and a last one to test; return their names."""
    every = [names.case.format(k=k) for k in range(1, 60)]
    subsets = {name: subset_of_patient(patient_named(name)) for name in every}
    test = next(name for name in every if subsets[name] == "test")
    chosen = [name for name in every if subsets[name] != "test"][:3] + [test]
    for name, (volume, mask) in zip(chosen, VOLUMES, strict=True):
        write_case(root, names, name, volume, mask)
    return chosen


def tiny_training(images: Path, out: Path, *more: object) -> None:
    words = ["--images", images, "--weights", out / "w", "--logs", out / "l", "--cache", out / "c"]
    words += ["--image-size", 32, "--features", 2, "--epochs", 1, "--vis-freq", 0]
    words += ["--folds", 2, "--fold", 0, "--device", "cpu", "--workers", 2, *more]
    train.main([str(word) for word in words])


def segment(images: Path, out: Path, *more: object) -> object:
    words = ["--images", images, "--weights", out / "w" / "unet.pt", "--predictions", out / "p"]
    words += ["--figure", out / "dsc.png", "--device", "cpu", "--workers", 2, *more]
    return run_main(inference.main, *words)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("layout", ["BIDS", "any"])
def test_cohort_is_trained_on_segmented_and_scored(tmp_path, capsys, layout):
    root, names = tmp_path / "cohort", LAYOUTS[layout]
    cases = write_cohort(root, names)
    test = root / place(names.flair, cases[-1])
    kept = test.read_bytes()
    test.write_bytes(b"damaged")  # a bad test case must not stop a training
    subsets = zip(cases, ("train", "train", "validation", "test"), strict=True)
    lines = "".join(f"{case},{patient_named(case)},{subset}\n" for case, subset in subsets)
    options = (*names.options, "--patients", table(tmp_path, f"case,patient,subset\n{lines}"))
    try:
        tiny_training(root / names.images, tmp_path, *options)
    finally:
        test.write_bytes(kept)
    said = capsys.readouterr().out
    assert "train 1 case" in said or "train 2 cases of 2 patients" in said
    assert "test 1 case of 1 patient" in said
    assert segment(root / names.images, tmp_path, *names.options) == 0
    said = capsys.readouterr()
    assert "4 of 4 cases segmented" in said.out and "stands in" not in said.err
    rows = {row["case"]: row for row in read_rows(tmp_path / "p" / "metrics.csv")}
    assert rows.keys() == set(cases)
    for name, (_, mask) in zip(cases, VOLUMES, strict=True):
        image = SimpleITK.ReadImage(str(tmp_path / "p" / f"{name}_mask.nii.gz"))
        assert image.GetSize() == mask.shape[::-1] and image.GetSpacing()[2] == 5
        assert float(rows[name]["lesion_voxels"]) == mask.sum()
    words = ["--images", root / names.images, "--weights", tmp_path / "w" / "unet.pt"]
    words += ["--out", tmp_path / "e", "--subset", "test", "--device", "cpu", *options]
    evaluate.main([str(word) for word in words])
    assert "validation 0 cases of 0 patients, test 1 case of 1 pat" in capsys.readouterr().out
    assert cases[-1] in (tmp_path / "e" / "scores.csv").read_text()


def sources_of(root: Path, names: Names):
    return list_cases(root / names.images, layout=parse_sequences(names.options[1:] or None))


# Which files are a case


BRATS = LAYOUTS["BraTS 2021"]


@pytest.mark.parametrize("names", LAYOUTS.values(), ids=LAYOUTS)
def test_the_files_of_each_layout(tmp_path, monkeypatch, names):
    pairs = dict(zip(write_cohort(tmp_path, names), VOLUMES, strict=True))
    whole = sources_of(tmp_path, names)
    assert {source.name for source in whole} == set(pairs)
    for source in whole:
        volume, mask = source.open().read_pair()
        assert np.array_equal(volume, pairs[source.name][0]), "in the order pre, FLAIR, post"
        assert np.array_equal(mask, pairs[source.name][1])
    monkeypatch.chdir(tmp_path)
    for one, other in zip(whole, sources_of(Path(), names), strict=True):
        assert one.name == other.name and one.open().masks
        assert [path.resolve() for path in one.open().files] == [
            path.resolve() for path in other.open().files
        ]


def test_one_case_folder_is_one_case(tmp_path):
    write_case(tmp_path, BRATS, "BraTS2021_00001", *VOLUMES[0])
    (case,) = find_cases(tmp_path / "BraTS2021_00001")
    assert case.name == "BraTS2021_00001" and np.array_equal(case.read(), VOLUMES[0][0])
    assert np.array_equal(find_case(tmp_path / "BraTS2021_00001").read_pair()[1], VOLUMES[0][1])


def test_flair_stands_in_for_missing_sequences(tmp_path):
    write_case(tmp_path, BRATS, "BraTS2021_00001", *VOLUMES[0])
    (tmp_path / "BraTS2021_00001" / "BraTS2021_00001_t1ce.nii.gz").unlink()
    (case,) = find_cases(tmp_path)
    assert case.replaced == ["post-contrast"]
    assert case.notes == ["FLAIR stands in for post-contrast"]


def test_a_linked_bids_subject_has_the_masks_of_its_data_set(tmp_path):
    (name, *_) = write_cohort(tmp_path / "bids", LAYOUTS["BIDS"])
    subject, _, _ = name.partition("_")
    (tmp_path / subject).symlink_to(tmp_path / "bids" / subject)
    (case,) = find_cases(tmp_path / subject)
    assert case.name == name and case.masks


def test_two_files_of_one_sequence_are_refused(tmp_path):
    write_case(tmp_path, BRATS, "x", *VOLUMES[0])
    write(tmp_path / "x" / "y_flair.nii.gz", VOLUMES[1][0][..., 1])
    with pytest.raises(ValueError, match=r"x_flair.nii.gz and y_flair.nii.gz both match flair="):
        find_cases(tmp_path)


def test_bids_subject_without_sessions(tmp_path):
    volume, mask = VOLUMES[0]
    write(tmp_path / "sub-1/anat/sub-1_FLAIR.nii.gz", volume[..., 1])
    write(tmp_path / "sub-1/anat/sub-1_ce-gd_T1w.nii.gz", volume[..., 2])
    for other in ("desc-brain_mask", "desc-ribbon_mask"):
        write(tmp_path / f"derivatives/sub-1/anat/sub-1_{other}.nii.gz", mask.astype("u1"))
    for root in (tmp_path, tmp_path / "sub-1"):
        (case,) = find_cases(root)
        assert case.name == "sub-1" and case.masks == (), "a mask of the brain is none of a lesion"
        assert np.array_equal(case.read()[..., 2], volume[..., 2])
    (tmp_path / "sub-1/anat/sub-1_FLAIR.nii.gz").unlink()
    with pytest.raises(ValueError, match="sub-1: no file matches flair=.*BIDS"):
        find_cases(tmp_path)


@pytest.mark.parametrize(
    "words, reason",
    [
        (["flair=*_x.nii.gz"], "no file in its folders matches flair=\\*_x.nii.gz"),
        (
            ["flair=*_flair.nii.gz", "pre=*_x.nii.gz"],
            "no file in its folders matches pre=\\*_x.nii.gz",
        ),
        (["flair=*_flair.nii.gz", "mask=*_x"], "no file in its folders matches mask=\\*_x"),
        (["flair=*_t1*"], "_t1.nii.gz and .*_t1ce.nii.gz both match flair=\\*_t1\\*"),
        (["pre=*_t1.nii.gz"], "flair is missing"),
        (["flair=a", "flair=b"], "--sequences flair=b: give each"),
        (["t2=a"], "--sequences t2=a: give each"),
        (["flair"], "--sequences flair: give each"),
    ],
)
def test_patterns_that_cannot_be_used_are_one_sentence(tmp_path, capsys, words, reason):
    write_case(tmp_path / "in", BRATS, "x", *VOLUMES[0])
    with pytest.raises(ValueError, match=reason) as stop:
        for source in list_cases(tmp_path / "in", layout=parse_sequences(words)):
            source.open()
    assert "\n" not in str(stop.value)


def test_a_case_that_lacks_flair_is_named_not_dropped(tmp_path):
    for name in "xy":
        write_case(tmp_path, BRATS, name, *VOLUMES[0])
    (tmp_path / "y" / "y_flair.nii.gz").unlink()
    layout = parse_sequences(["flair=*_flair.nii.gz", "pre=*_t1.nii.gz"])
    first, second = list_cases(tmp_path, layout=layout)
    assert first.open().name == "x"
    with pytest.raises(ValueError, match=f"{tmp_path}/y: no file matches flair="):
        second.open()


def test_folders_of_timepoints_are_cases(tmp_path):
    for week in ("week-000", "week-044"):
        write_case(tmp_path / "p1", BRATS, week, *VOLUMES[0])
    cases = list_cases(tmp_path, layout=parse_sequences(["flair=*_flair.nii.gz"]))
    assert [case.name for case in cases] == ["p1_week-000", "p1_week-044"]
    assert {patient_of(case) for case in cases} == {"p1"}


# Labels


@pytest.fixture
def labelled(tmp_path) -> tuple[Path, np.ndarray]:
    """Write two cases with the labels 1, 2 and 4; the second lacks 4."""
    labels = np.zeros((4, 32, 32), np.uint8)
    labels[1:3, 8:20, 8:20], labels[2, 10:14, 10:14], labels[2, 14:16, 14:16] = 2, 1, 4
    for name, mask in (("c1", labels), ("c6", np.where(labels == 4, 2, labels).astype("u1"))):
        write_case(tmp_path / "in", BRATS, name, VOLUMES[0][0], mask)
        shutil.copy(
            write(tmp_path / "m.nii.gz", mask), tmp_path / "in" / name / f"{name}_seg.nii.gz"
        )
    return tmp_path / "in", labels


def test_any_label_is_lesion_and_reported_once(labelled, capsys):
    root, labels = labelled
    masks = [source.open().read_mask() for source in list_cases(root, labels=Labels())]
    assert np.array_equal(masks[0], labels > 0) and np.array_equal(masks[1], labels > 0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("c1: its mask holds the labels 1, 2, 4;") and "--labels" in line


def test_chosen_labels_are_lesion(labelled, capsys):
    root, labels = labelled
    chosen = Labels([1, 4])
    masks = [source.open().read_mask() for source in list_cases(root, labels=chosen)]
    assert np.array_equal(masks[0], np.isin(labels, (1, 4)))
    assert np.array_equal(masks[1], labels == 1), "a case may lack a label"
    chosen.check()
    assert capsys.readouterr().err == ""


def test_labels_choose_what_is_trained_on_and_scored(labelled, tmp_path, capsys):
    root, labels = labelled
    words = "--folds", 2, "--fold", 0, "--labels", 1, 4
    for _ in (0, 1):  # from the sources, and from the cache
        with pytest.raises(SystemExit, match="--labels 7: none of the 2 masks read holds this"):
            tiny_training(root, tmp_path, "--labels", 7)
    tiny_training(root, tmp_path, *words)
    assert read_card(tmp_path / "w" / "unet.pt")["recipe"]["labels"] == [1, 4]
    assert segment(root, tmp_path, "--labels", 1, 4) == 0
    rows = (tmp_path / "p" / "metrics.csv").read_text().splitlines()
    assert rows[1].split(",")[2] == str(int(np.isin(labels, (1, 4)).sum()))
    again = segment(root, tmp_path, "--labels", 1, 4, "--skip-existing")
    assert again == 0 and "2 kept" in capsys.readouterr().out
    assert "holds this label; they hold 1, 2, 4" in segment(root, tmp_path, "--labels", 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32])
def test_labels_stored_with_a_scale_are_whole(labelled, dtype, capsys):
    """nibabel scales floats saved as integers: 1, 2, 4 become 1.0039, 1.992, 4 or 1.00002, ..."""
    root, labels = labelled
    path = root / "c1" / "c1_seg.nii.gz"
    image = nibabel.load(path)
    scaled = nibabel.Nifti1Image(labels.T.astype(float), image.affine, image.header)
    scaled.set_data_dtype(dtype)
    scaled.header.set_slope_inter(None, None)
    nibabel.save(scaled, path)
    for chosen in ((1, 4), (2,), ()):
        labels_of_run = Labels(chosen)
        case = list_cases(root, labels=labels_of_run)[0].open()
        wanted = np.isin(labels, chosen or (1, 2, 4))
        assert np.array_equal(case.read_mask(), wanted)
        assert labels_of_run.by_case == {"c1": [1, 2, 4]}


def grown(mask: np.ndarray, factor: float) -> np.ndarray:
    """Resize a mask (S, H, W) bool linearly, to 0..255."""
    size = round(mask.shape[2] * factor), round(mask.shape[1] * factor)
    images = (Image.fromarray(image * np.uint8(255)) for image in mask)
    return np.stack([np.asarray(image.resize(size, Image.BILINEAR)) for image in images])


HERE = Path("m.nii.gz")


@pytest.mark.parametrize("factor", [0.5, 0.75, 1.5, 2])
def test_a_resized_mask_keeps_its_volume(factor, capsys):
    mask = make_volume(1, 8, 128)[1]
    grey = grown(mask, factor)
    for scale in (1, 1 / 255):  # 0..255, or 0..1
        found = Labels().lesion(grey * scale if scale < 1 else grey, "m", HERE)
        assert found.sum() == pytest.approx(mask.sum() * factor**2, rel=0.025)
        assert (grey > 0).sum() > 1.08 * mask.sum() * factor**2
    assert "m: its mask has grey edges" in capsys.readouterr().err
    found = Labels().lesion(np.rint(grey / 255 * 50).astype(np.uint8), "m", HERE)
    assert found.sum() == pytest.approx(mask.sum() * factor**2, rel=0.05)
    with pytest.raises(ValueError, match="m.nii.gz: holds fractions or grey edges, not labels"):
        Labels([255]).lesion(grey, "m", HERE)


def areas(labels: Sequence[int]) -> np.ndarray:
    """Make a mask (4, 64, 64) with a block of 4 x 6 x 6 voxels of each label."""
    mask = np.zeros((4, 64, 64), np.int32)
    for k, label in enumerate(labels):
        mask[:, 8 * (k // 8) : 8 * (k // 8) + 6, 8 * (k % 8) : 8 * (k % 8) + 6] = label
    return mask


@pytest.mark.parametrize(
    "labels",
    [
        range(1, 61),  # numbered lesions
        (85, 170, 255),
        (40, 80, 120, 160, 200),
        (2, 3, 4, 41, 42, 77, 251, 1001, 1002, 2035),  # of FreeSurfer
    ],
)
def test_many_labels_stay_labels(labels, capsys):
    mask = areas(labels)
    run = Labels()
    assert np.array_equal(run.lesion(mask, "m", HERE), mask > 0)
    assert run.by_case == {"m": list(labels)}
    assert "its mask holds the labels" in capsys.readouterr().err
    chosen = labels[2]
    assert np.array_equal(Labels([chosen]).lesion(mask, "m", HERE), mask == chosen)


def test_small_numbered_lesions_stay_labels():
    mask = np.zeros((4, 64, 64), np.uint8)
    mask[1, ::6, ::6] = np.arange(1, 122).reshape(11, 11)  # single voxels
    assert np.array_equal(Labels().lesion(mask, "m", HERE), mask > 0)


def test_a_grey_mask_from_the_cache_is_said_again(tmp_path, capsys):
    write_case(tmp_path / "in", BRATS, "c1", *VOLUMES[0])
    soft = np.rint(grown(VOLUMES[0][1], 0.5)).repeat(2, 1).repeat(2, 2)
    soft = (soft.astype(int) + np.roll(soft, 1, 2) + np.roll(soft, 1, 1)) // 3
    write(tmp_path / "in" / "c1" / "c1_seg.nii.gz", soft.astype(np.uint8))
    for _ in (0, 1):
        (source,) = list_cases(tmp_path / "in", labels=Labels())
        prepare([source.open()], 32, tmp_path / "cache", 1)
        assert "c1: its mask has grey edges" in capsys.readouterr().err


# Bad cases


def test_bad_cases_are_left_out_only_when_asked(tmp_path, capsys):
    root, names = tmp_path / "in", LAYOUTS["BraTS 2021"]
    first, second, third, fourth = write_cohort(root, names)
    for name in (first, second):
        copy = f"{name}_20200101"  # so that each fold has a patient left
        write_case(root, names, copy, *VOLUMES[3])
    bad = root / place(names.flair, first)
    bad.write_bytes(b"damaged")
    write(root / place(names.mask, second), np.zeros((3, 32, 32), np.uint8))
    with pytest.raises(SystemExit, match=f"error: {bad}: not a readable volume"):
        tiny_training(root, tmp_path)
    capsys.readouterr()
    tiny_training(root, tmp_path, "--skip-bad")
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if line.startswith("left out: ")]
    assert len(lines) == 2 and str(bad) in lines[0] + lines[1]
    card = read_card(tmp_path / "w" / "unet.pt")["cases"]
    assert {*card["train"], *card["validation"]} == {
        third, fourth, f"{first}_20200101", f"{second}_20200101"
    }  # fmt: skip


def test_a_full_cache_is_not_a_bad_case(tmp_path, monkeypatch):
    write_cohort(tmp_path / "in", BRATS)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("brainseg.cache.np.save", full)
    with pytest.raises(SystemExit, match="cannot keep preprocessed volumes"):
        tiny_training(tmp_path / "in", tmp_path, "--skip-bad")


# Patients


def table(folder: Path, text: str) -> Path:
    (folder / "patients.csv").write_text(text, encoding="utf-8-sig")
    return folder / "patients.csv"


def test_a_file_names_the_patient_of_each_case(tmp_path, capsys):
    cases = write_cohort(tmp_path / "in", BRATS)
    lines = "".join(f"{name},{'TCGA_CS_4942' if k < 2 else k}\n" for k, name in enumerate(cases))
    path = table(tmp_path, f"Case,Patient\n{lines}\n")
    layout = BRATS.options[1:] or None
    listed = {source.name: source for source in list_cohort(tmp_path / "in", layout, patients=path)}
    first, second, third, _ = (listed[name].open() for name in cases)
    assert patient_of(first) == patient_of(second) == "TCGA_CS_4942" != patient_of(third)
    assert subset_of(first) == "train", "as the lists of LGG say"
    (again,) = list_cohort(tmp_path / "in", layout, names=[first.name])
    assert patient_of(again) == first.name


def test_a_renamed_lgg_case_stays_in_its_subset(tmp_path):
    name = (SPLITS / "validation.txt").read_text().split()[0]
    write_case(tmp_path / "in", BRATS, name, *VOLUMES[0])
    path = table(tmp_path, f"case,patient\n{name},renamed\n")
    (case,) = list_cohort(tmp_path / "in", patients=path)
    assert patient_of(case) == "renamed" and subset_of(case) == "validation"


def test_patients_of_a_file_are_in_the_card(tmp_path, capsys):
    cases = write_cohort(tmp_path / "in", BRATS)
    people = ["p1", "p1", "p3", "p4"]
    lines = "".join(f"{case},{person}\n" for case, person in zip(cases, people, strict=True))
    path = table(tmp_path, f"case,patient\n{lines}")
    tiny_training(tmp_path / "in", tmp_path, "--patients", path)
    card = read_card(tmp_path / "w" / "unet.pt")
    used = [*card["cases"]["train"], *card["cases"]["validation"]]
    assert card["patients"] == {c: p for c, p in zip(cases, people, strict=True) if c in used}
    assert card["recipe"]["patients"] == "patients.csv", "no path"
    assert segment(tmp_path / "in", tmp_path) == 0
    marked = [line for line in capsys.readouterr().out.splitlines() if line.endswith("*")]
    assert len(marked) == len(card["cases"]["train"])


@pytest.mark.parametrize(
    "text, reason",
    [
        ("case,patient\na,1\n", "patients.csv: lacks the case BraTS2021_.* and 3 others"),
        ("name,patient\na,1\n", "patients.csv: is not a table with the columns case and patient"),
        ("", "patients.csv: is not a table"),
        (
            "case,patient\na,1\na,2\n",
            "patients.csv: gives a the patients 1 and 2",
        ),
        ("case,patient\na\n", "patients.csv: the line of a lacks its case or its patient"),
    ],
)
def test_a_bad_file_of_patients_is_refused(tmp_path, text, reason):
    write_cohort(tmp_path / "in", BRATS)
    with pytest.raises(SystemExit, match=reason):
        tiny_training(tmp_path / "in", tmp_path, "--patients", table(tmp_path, text))
    with pytest.raises(SystemExit, match="none.csv: no such file"):
        tiny_training(tmp_path / "in", tmp_path, "--patients", tmp_path / "none.csv")
