"""Test inference.py end to end: the files it writes, custom data, resuming, and bad input."""

import functools
import hashlib
import io
import os
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import tifffile
import torch
from conftest import (
    FORK,
    TRAINED_ON,
    contents,
    in_processes,
    make_weights,
    read_rows,
    run_main,
    traces,
)
from test_files import leave_scratch

import inference
from brainseg import metrics, pipeline, run_files
from brainseg.io.files import check_ours, locked
from brainseg.io.layouts import find_case, list_cases
from brainseg.io.pictures import save_dsc_figure
from brainseg.metrics import dsc
from brainseg.phantom import make_volume
from brainseg.segmenter import Segmenter
from brainseg.weights import file_hash


def infer(images: Path, out: Path, weights: Path, *more: object) -> str | int:
    """Run to the end; return the exit status, or the sentence for stderr with status 1."""
    base = {
        "--images": images, "--weights": weights, "--predictions": out / "predictions",
        "--figure": out / "dsc.png", "--device": "cpu",
    }  # fmt: skip
    words = [word for pair in base.items() for word in pair]
    return run_main(inference.main, *words, *more)


def refused(*arguments: object) -> str:
    message = infer(*arguments)
    assert isinstance(message, str) and message.startswith("error: ")
    assert "\n" not in message and "Errno" not in message
    return message


def one_sentence(capsys) -> str:
    """Return the one line that a run wrote on stderr."""
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def digest(folder: Path) -> str:
    return hashlib.sha256(repr(sorted(contents(folder).items())).encode()).hexdigest()


def table(out: Path, name: str = "metrics.csv") -> list[dict]:
    return read_rows(out / "predictions" / name)


def volumes(out: Path) -> list[dict]:
    return table(out, "volumes.csv")


def read_masks(out: Path, name: str) -> np.ndarray:
    """Read the masks (S, H, W) written for a case, by slice number."""
    paths = (out / "predictions" / name).glob(f"{name}_*_mask.tif")
    paths = sorted(paths, key=lambda path: int(path.stem.split("_")[-2]))
    return np.stack([tifffile.imread(path) for path in paths])


def write_case(folder: Path, volume: np.ndarray, suffix: str = ".tif") -> Path:
    """Write a case without masks, with an arbitrary name and slices numbered from 3."""
    folder.mkdir(parents=True)
    channels_last = {"photometric": "minisblack", "planarconfig": "contig"}
    for k, image in enumerate(volume, start=3):
        if suffix == ".tif":
            options = channels_last if image.ndim == 3 else {}
            tifffile.imwrite(folder / f"scan_of_{k}.tif", image, **options)
        else:
            iio.imwrite(folder / f"scan_of_{k}{suffix}", image)
    return folder


def subset_copy(phantoms: Path, folder: Path, *names: str) -> Path:
    for name in names:
        shutil.copytree(phantoms / name, folder / name)
    return folder


def damage(path: Path, length: int = 200) -> None:
    """Truncate a file, as a broken download does."""
    path.write_bytes(path.read_bytes()[:length])


@pytest.fixture(scope="module")
def done(phantoms, weights, tmp_path_factory) -> tuple[Path, str]:
    """Segment all cases; return the folder and what was printed."""
    out, said, before = tmp_path_factory.mktemp("done"), io.StringIO(), digest(phantoms)
    with redirect_stdout(said):
        assert infer(phantoms, out, weights) == 0
    assert digest(phantoms) == before, "the inputs are untouched"
    return out, said.getvalue()


# What a run writes


def test_every_slice_gets_a_mask_and_a_picture(phantoms, done):
    out, _ = done
    predictions, found = out / "predictions", 0
    names = sorted(folder.name for folder in phantoms.iterdir())
    assert sorted(p.name for p in predictions.iterdir() if p.suffix != ".lock") == sorted(
        [
            *names,
            *(f"{name}.gif" for name in names),
            "metrics.csv",
            "volumes.csv",
            "args.json",
            "run.json",
        ]
    )
    for name in names:
        masks = read_masks(out, name)
        assert masks.shape == (8, 64, 64) and masks.dtype == np.uint8
        assert set(np.unique(masks)) <= {0, 255}
        found += np.count_nonzero(masks)
        for k in range(1, 9):
            picture = iio.imread(predictions / name / f"{name}_{k}.png")
            assert picture.shape == (256, 256, 3) and picture.dtype == np.uint8, "enlarged"
            red = (picture == (255, 0, 0)).all(axis=-1)
            mask = masks[k - 1].repeat(4, axis=0).repeat(4, axis=1)
            assert red.any() == mask.any() and (mask[red] == 255).all()
        assert len(list((predictions / name).iterdir())) == 16
        assert len(iio.imread(predictions / f"{name}.gif", index=None)) == 8
    assert found > 0, "these weights find something"
    assert iio.imread(out / "dsc.png").shape[2] in (3, 4)


def test_table_is_what_the_written_masks_score(phantoms, done):
    rows = table(done[0])
    assert list(rows[0]) == [
        *("case", "slices", "lesion_voxels", "predicted_voxels"),
        *metrics.score(np.ones((1, 1, 1), bool), np.ones((1, 1, 1), bool)),
        *("patient", "trained_on", "brainseg_run"),
    ]
    assert [row["case"] for row in rows] == [f"phantom_{i:03d}" for i in range(12)]
    for row in rows:
        truth = find_case(phantoms / row["case"]).read_mask()
        mask = read_masks(done[0], row["case"]) > 0
        assert int(row["slices"]) == 8
        assert (int(row["lesion_voxels"]), int(row["predicted_voxels"])) == (
            truth.sum(),
            mask.sum(),
        )
        for name, expected in metrics.score(mask, truth).items():
            assert float(row[name]) == pytest.approx(expected, rel=1e-5, nan_ok=True), name
    assert sum(float(row["dsc"]) > 0 for row in rows) >= 3, "so that the scores mean something"


def test_cases_trained_on_are_marked_and_not_counted(done):
    out, said = done
    rows = table(out)
    assert [row["case"] for row in rows if row["trained_on"] == "1"] == TRAINED_ON
    unseen = [float(row["dsc"]) for row in rows if row["trained_on"] == "0"]
    pattern = (
        r"DSC mean (\d\.\d{3}) \(lowest (\d\.\d{3}), highest (\d\.\d{3})\), median (\d\.\d{3}), "
        r"n = (\d+)"
    )
    ((mean, low, high, median, count),) = re.findall(pattern, said)
    assert int(count) == len(unseen) == 10
    mean, low, high, median = map(float, (mean, low, high, median))
    assert mean == pytest.approx(np.mean(unseen), abs=6e-4)
    assert [low, high] == pytest.approx([min(unseen), max(unseen)], abs=6e-4)
    assert median == pytest.approx(np.median(unseen), abs=6e-4)
    marked = [line.split()[0] for line in said.splitlines() if line.endswith("*")]
    assert marked == TRAINED_ON and "12 of 12 cases segmented" in said


def test_one_case_folder_chosen_cases_and_subsets(phantoms, weights, done, tmp_path):
    chosen = {
        "one": (phantoms / "phantom_004", ()),
        "two": (phantoms, ("--cases", "phantom_003", "phantom_005")),
        "validation": (phantoms, ("--subset", "validation")),
        "test": (phantoms, ("--subset", "test")),
    }
    cases = {}
    for name, (images, more) in chosen.items():
        assert infer(images, tmp_path / name, weights, "--no-pictures", *more) == 0
        cases[name] = [int(row["case"][-3:]) for row in table(tmp_path / name)]
    assert cases == {"one": [4], "two": [3, 5], "validation": [11], "test": [0, 7, 9]}
    assert np.array_equal(
        read_masks(tmp_path / "one", "phantom_004"), read_masks(done[0], "phantom_004")
    )


@pytest.mark.parametrize(
    "dtype, channels, suffix",
    [(np.uint8, 3, ".png"), (np.uint16, 3, ".tif"), (np.uint16, 1, ".png"), (np.uint8, 1, ".tif")],
)
def test_custom_slices_come_back_in_their_own_geometry(tmp_path, dtype, channels, suffix):
    volume = make_volume(1, 6, 60)[0][:, :, 8:52, :channels].astype(dtype)
    volume = volume * (257 if dtype == np.uint16 else 1)
    volume = volume.astype(dtype)[..., 0] if channels == 1 else volume.astype(dtype)
    write_case(tmp_path / "images" / "patient 7", volume, suffix)
    narrow = make_weights(tmp_path / "narrow.pt", channels)
    assert infer(tmp_path / "images", tmp_path, narrow) == 0
    masks = read_masks(tmp_path, "patient 7")
    assert masks.shape == (6, 60, 44) and set(np.unique(masks)) == {0, 255}
    folder = tmp_path / "predictions" / "patient 7"
    assert {p.name for p in folder.glob("*_mask.tif")} == {
        f"patient 7_{k}_mask.tif" for k in range(3, 9)
    }
    assert iio.imread(folder / "patient 7_3.png").shape == (240, 176, 3), "enlarged"
    assert not (tmp_path / "predictions" / "metrics.csv").exists(), "there are no true masks"
    assert not (tmp_path / "dsc.png").exists()


def test_flags_that_change_the_mask_do(phantoms, weights, done, tmp_path):
    changes = {
        "--no-largest-component": lambda new, old: (new >= old).all() and (new > old).any(),
        "--tta": lambda new, old: (new != old).any(),
        "--threshold=0.9": lambda new, old: new.sum() < old.sum(),
    }
    names = "phantom_003", "phantom_005"
    before = np.stack([read_masks(done[0], name) for name in names])
    for flag, changed in changes.items():
        more = flag, "--no-pictures", "--cases", *names
        assert infer(phantoms, tmp_path / flag, weights, *more) == 0
        after = np.stack([read_masks(tmp_path / flag, name) for name in names])
        assert changed(after, before), flag


# Resuming


def test_finished_cases_are_skipped_and_still_scored(
    phantoms, weights, tmp_path, monkeypatch, capsys
):
    names = "phantom_003", "phantom_004"
    again = phantoms, tmp_path, weights, "--skip-existing", "--cases", *names
    assert infer(*again) == 0
    first = contents(tmp_path / "predictions")

    segmented, work = [], Segmenter.segmentation_of

    def spy(self, probabilities, frame, spacing):
        segmented.append(frame)
        return work(self, probabilities, frame, spacing)

    monkeypatch.setattr(Segmenter, "segmentation_of", spy)
    assert infer(*again) == 0
    assert not segmented, "the network does not run again"
    assert contents(tmp_path / "predictions") == first
    path = tmp_path / "predictions" / "volumes.csv"
    path.write_text("damaged")
    assert f"{path}: is in the way" in infer(*again)
    path.unlink()
    assert infer(*again) == 0 and len(segmented) == 2, "a case without its row is made anew"
    assert contents(tmp_path / "predictions") == first
    segmented.clear()

    folder = tmp_path / "predictions"
    (folder / names[0] / f"{names[0]}_8_mask.tif").unlink()
    assert infer(*again) == 0
    assert len(segmented) == 1, "a folder that is not whole is made anew"
    assert contents(folder) == first
    mask = folder / names[1] / f"{names[1]}_1_mask.tif"
    for length in (0, 4000):  # each causes a different error in the image libraries
        damage(mask, length)
        assert infer(*again) == 0
        assert contents(folder) == first
    damage(mask, 100)  # cut off before the mark, it could be anybody's
    assert infer(*again) == 1
    assert f"{mask}: is in the way" in capsys.readouterr().err


def test_masks_of_changed_sources_are_made_again(phantoms, weights, tmp_path, capsys):
    names = "phantom_003", "phantom_004"
    images = subset_copy(phantoms, tmp_path / "in", *names)
    again = images, tmp_path, weights, "--skip-existing", "--no-pictures"
    assert infer(*again) == infer(*again) == 0
    assert "2 kept from an earlier run" in capsys.readouterr().out
    source = images / names[0] / f"{names[0]}_3.tif"
    tifffile.imwrite(source, tifffile.imread(images / names[1] / f"{names[1]}_3.tif"))
    assert infer(*again) == 0
    assert "1 kept from an earlier run" in capsys.readouterr().out
    assert infer(*again) == 0
    assert "2 kept from an earlier run" in capsys.readouterr().out


def test_the_mask_of_another_scan_of_that_name_is_not_kept(weights, tmp_path, capsys):
    for k in (1, 2):  # the second one is older
        case = write_case(tmp_path / f"v{k}" / "case", make_volume(k, slices=4, size=64)[0])
        for path in case.iterdir():
            os.utime(path, (0, 0))
    for visit, kept in ("v1", 0), ("v2", 0), ("v2", 1):
        assert infer(tmp_path / visit, tmp_path, weights, "--skip-existing") == 0
        assert ("1 kept" in capsys.readouterr().out) == kept


def test_a_killed_run_loses_no_row_of_a_mask_that_is_kept(
    phantoms, weights, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(run_files, "SAVE_EVERY", 0)
    monkeypatch.setattr(run_files.distributed, "gather", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(run_files.Run, "save", once(run_files.Run.save))
    names = "--no-pictures", "--cases", "phantom_003", "phantom_004"
    with pytest.raises(ZeroDivisionError):
        infer(phantoms, tmp_path, weights, *names)
    monkeypatch.undo()
    assert infer(phantoms, tmp_path, weights, "--skip-existing", *names) == 0
    assert "1 kept from an earlier run" in capsys.readouterr().out, "the one with a row"


def once(function):
    """Make a function that does nothing from its second call on."""
    calls = iter([function])
    return lambda *arguments: next(calls, lambda *_: None)(*arguments)


def test_masks_of_another_precision_are_not_kept(phantoms, weights, tmp_path, capsys):
    only = phantoms, tmp_path, weights, "--cases", "phantom_003"
    assert infer(*only, "--no-amp") == 0
    assert "made with other settings" in refused(*only, "--skip-existing", "--amp")
    same = "--no-amp", "--batch-size", 1, "--image-size", 32
    assert infer(*only, "--skip-existing", *same) == 0
    assert "1 kept from an earlier run" in capsys.readouterr().out


def test_rows_of_other_cases_stay(phantoms, weights, tmp_path):
    assert infer(phantoms, tmp_path, weights, "--cases", "phantom_003") == 0
    (before,) = table(tmp_path)
    write_case(tmp_path / "x" / "case", make_volume(1, slices=4, size=64)[0])
    other = make_weights(tmp_path / "other.pt", trained_on=["x"])
    other.write_bytes(weights.read_bytes() + b"\0")
    assert infer(tmp_path / "x", tmp_path, other) == 0
    assert table(tmp_path) == [before], "its mask stays too; `case` has no truth"
    rows = volumes(tmp_path)
    assert [row["case"] for row in rows] == ["case", "phantom_003"]
    first, second = (row["brainseg_run"] for row in rows)
    assert first != second and second == before["brainseg_run"]
    assert second[:8] == file_hash(weights)[:8]


def test_masks_of_other_weights_or_settings_are_not_kept(phantoms, weights, tmp_path):
    only = "--cases", "phantom_003"
    assert infer(phantoms, tmp_path, weights, *only) == 0
    before = contents(tmp_path / "predictions")
    other = make_weights(tmp_path / "other.pt", trained_on=["x"])
    other.write_bytes(weights.read_bytes() + b"\0")
    again = *only, "--skip-existing"
    said = refused(phantoms, tmp_path, weights, *again, "--threshold", 0.9, "--tta")
    assert "made with other settings (phantom_003); leave out --skip-existing" in said
    said = refused(phantoms, tmp_path, other, *again)
    assert "1 of the masks there were made with other weights (phantom_003); leave out" in said
    assert contents(tmp_path / "predictions") == before

    # Nor if a run with these weights was in the folder since.
    assert infer(phantoms, tmp_path, other, "--cases", "phantom_004") == 0
    both = "--skip-existing", "--cases", "phantom_003", "phantom_004"
    assert "other weights (phantom_003)" in refused(phantoms, tmp_path, other, *both)
    # Nor if the row is of these weights, but the mask itself says that it is not.
    path = tmp_path / "predictions" / "volumes.csv"
    rows = {row["case"]: row for row in volumes(tmp_path)}
    run = rows["phantom_003"]["brainseg_run"]
    path.write_text(path.read_text().replace(run, rows["phantom_004"]["brainseg_run"]))
    (place,) = (tmp_path / "predictions" / "phantom_003").glob("phantom_003_3_mask.tif")
    old = place.stat().st_mtime_ns
    assert infer(phantoms, tmp_path, other, *both) == 0
    assert place.stat().st_mtime_ns > old


def test_a_folder_that_another_run_writes_to_is_refused(phantoms, weights, tmp_path):
    only = "--cases", "phantom_003"
    (tmp_path / "predictions").mkdir()
    with locked(tmp_path / "predictions", "--predictions"):
        said = refused(phantoms, tmp_path, weights, *only)
    assert f"{tmp_path / 'predictions'}: another run is writing there" in said
    assert not contents(tmp_path / "predictions")
    assert infer(phantoms, tmp_path, weights, *only) == 0


FOREIGN = {
    "volumes.csv": "case,ml\na,1\n",
    "metrics.csv": "case,dsc\na,1\n",
    "args.json": "{}",
    "phantom_003_seg.dcm": "a Segmentation by another tool",
    "phantom_003/phantom_003_3_mask.tif": "a mask that somebody drew",
    "phantom_003/phantom_003_3_probability.tif": "a map of another network",
    "phantom_003.gif": "a picture",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_files_of_others_are_neither_replaced_nor_removed(
    phantoms, weights, tmp_path, name, capsys
):
    path = tmp_path / "predictions" / name
    path.parent.mkdir(parents=True)
    path.write_text(FOREIGN[name])
    status = infer(phantoms, tmp_path, weights, "--cases", "phantom_003")
    said = f"{status} {capsys.readouterr().err}"
    assert status != 0 and f"error: {path}: is in the way, and was not written by this" in said
    assert path.read_text() == FOREIGN[name]


def test_bytes_that_are_no_text_end_no_cohort(phantoms, weights, tmp_path, capsys):
    images = subset_copy(phantoms, tmp_path / "images", "phantom_003")
    header = b"NDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\nElementDataFile = L\xfeCAL\n"
    (images / "a.mha").write_bytes(header + bytes(64))
    assert infer(images, tmp_path, weights, "--report", tmp_path / "r.html") == 1
    assert "a.mha: its voxels, L" in capsys.readouterr().err
    assert [row["case"] for row in volumes(tmp_path)] == ["a", "phantom_003"]


def test_a_figure_or_report_of_others_is_not_replaced(phantoms, weights, tmp_path):
    for flag, name in (("--figure", "dsc.png"), ("--report", "report.html")):
        (tmp_path / name).write_text("the user's own")
        words = "--cases", "phantom_003", flag, tmp_path / name
        assert f"{tmp_path / name}: is in the way" in refused(phantoms, tmp_path, weights, *words)
        assert (tmp_path / name).read_text() == "the user's own"
        (tmp_path / name).unlink()


def test_what_was_written_may_be_written_again(phantoms, weights, tmp_path):
    run = phantoms, tmp_path, weights, "--cases", "phantom_003"
    report = "--report", tmp_path / "report.html"
    for _ in range(2):
        assert infer(*run, "--probabilities", *report) == 0
    assert infer(*run, *report) == 0
    assert not list((tmp_path / "predictions").rglob("*probability*"))
    for suffix in ("png", "pdf", "svg", "jpg"):
        figure = tmp_path / f"dsc.{suffix}"
        save_dsc_figure(figure, {"phantom_003": 0.5}, [])
        check_ours(figure)


def test_leftovers_of_a_killed_run_are_cleared(phantoms, weights, tmp_path):
    places = [tmp_path / name for name in ("predictions", "pages", "figures")]
    for place in places:
        place.mkdir()
        leave_scratch(place)
    assert list(tmp_path.glob("*/.brainseg-*/"))
    page = "--report", places[1] / "page.html", "--figure", places[2] / "dsc.png"
    assert infer(phantoms, tmp_path, weights, "--cases", "phantom_003", *page) == 0
    assert not list(tmp_path.glob("*/.brainseg-*/"))


@pytest.mark.parametrize("step", ["preprocess", "probabilities", "segmentation_of"])
def test_a_case_too_large_does_not_stop_the_others(
    phantoms, weights, tmp_path, monkeypatch, capsys, step
):
    work, calls = getattr(Segmenter, step), []

    def first_fails(*arguments, **options):
        calls.append(step)
        if len(calls) == 1:
            raise MemoryError
        return work(*arguments, **options)

    monkeypatch.setattr(Segmenter, step, first_fails)
    names = "--cases", "phantom_003", "phantom_004", "--workers", 1
    assert infer(phantoms, tmp_path, weights, *names) == 1
    said = capsys.readouterr()
    assert "phantom_003: does not fit into memory; crop it" in said.err
    assert "1 of 2 cases segmented" in said.out


def test_running_again_replaces_what_was_there(phantoms, weights, tmp_path):
    run = phantoms, tmp_path, weights, "--cases", "phantom_003"
    assert infer(*run, "--threshold", 0.9) == 0
    before = contents(tmp_path / "predictions")
    note = tmp_path / "predictions" / "phantom_003" / "note.txt"
    note.write_text("the user's own")
    assert infer(*run) == 0
    assert note.read_text() == "the user's own"
    note.unlink()
    after = contents(tmp_path / "predictions")
    assert after.keys() == before.keys() and after != before


def test_predictions_are_not_cases(phantoms, weights, tmp_path):
    """Their masks would be taken for true ones, their pictures and maps for scans."""
    images = subset_copy(phantoms, tmp_path / "images", "phantom_003")
    assert infer(images, images, weights, "--probabilities") == 0
    assert [source.name for source in list_cases(images)] == ["phantom_003"]
    message = refused(images / "predictions", tmp_path, weights)
    assert message.endswith(
        "predictions: holds predictions (args.json); give the folder of the scans"
    )


def test_linked_cases_keep_their_own_names(phantoms, weights, tmp_path):
    (tmp_path / "links").mkdir()
    for name in ("p1", "p2"):
        shutil.copytree(phantoms / "phantom_003", tmp_path / name / "scan")
        (tmp_path / "links" / name).symlink_to(tmp_path / name / "scan")
    assert infer(tmp_path / "links", tmp_path, weights) == 0
    assert {path.name for path in (tmp_path / "predictions").glob("*.gif")} == {"p1.gif", "p2.gif"}


# From a notebook


def test_a_run_in_a_thread_or_not_leaves_nothing_behind(phantoms, weights, tmp_path):
    before = traces()
    words = "--images", phantoms, "--weights", weights, "--cases", "phantom_003", "--device", "cpu"
    for k in (0, 1):
        out = "--predictions", tmp_path / str(k), "--figure", tmp_path / "dsc.png"
        work = functools.partial(inference.main, [str(word) for word in (*words, *out)])
        if k:
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(work).result() is None
        else:
            assert work() is None
        assert traces() == before
        assert (tmp_path / str(k) / "phantom_003.gif").is_file()


# Several processes


def shared(count: int, images: Path, out: Path, weights: Path, *more: object) -> list[str | int]:
    """Run in several processes; return the exit status or sentence of each."""
    return in_processes(count, lambda: infer(images, out, weights, *more))


def test_processes_share_the_cases_and_write_what_one_would(phantoms, weights, done, tmp_path):
    assert shared(2, phantoms, tmp_path, weights) == [0, 0]
    ours, theirs = contents(tmp_path / "predictions"), contents(done[0] / "predictions")
    assert ours.pop("args.json") != theirs.pop("args.json"), "written to another folder"
    assert ours == theirs
    assert (tmp_path / "dsc.png").read_bytes() == (done[0] / "dsc.png").read_bytes()


def test_each_process_segments_its_own_cases_only(phantoms, weights, tmp_path, monkeypatch, capfd):
    written, write = tmp_path / "written", pipeline.write_case

    def spy(folder, case, *more):
        with open(written, "a") as file:
            file.write(f"{os.getpid()} {case.name}\n")
        return write(folder, case, *more)

    monkeypatch.setattr(pipeline, "write_case", spy)
    cases = "--cases", "phantom_003", "phantom_004", "phantom_005"
    assert shared(2, phantoms, tmp_path, weights, "--skip-existing", *cases) == [0, 0]
    lines = [line.split() for line in written.read_text().splitlines()]
    assert sorted(name for _, name in lines) == list(cases[1:])
    assert len({pid for pid, _ in lines}) == 2
    said = capfd.readouterr().out
    assert said.count("3 of 3 cases segmented") == 1
    shutil.rmtree(tmp_path / "predictions" / "phantom_004")  # as if it had been stopped before
    assert shared(2, phantoms, tmp_path, weights, "--skip-existing", *cases) == [0, 0]
    assert len(written.read_text().splitlines()) == 4
    assert "1 of 3 cases segmented" in capfd.readouterr().out
    assert [row["case"] for row in table(tmp_path)] == list(cases[1:])


def test_a_damaged_case_in_one_process_is_named_by_it(phantoms, weights, tmp_path, capfd):
    images = subset_copy(phantoms, tmp_path / "images", "phantom_003", "phantom_004")
    damage(images / "phantom_004" / "phantom_004_5.tif")
    assert shared(2, images, tmp_path, weights) == [1, 1]
    out, err = capfd.readouterr()
    assert "1 of 2 cases segmented" in out and err.count("phantom_004_5.tif: ") == 1


def test_an_error_in_all_processes_is_reported_once(phantoms, weights, tmp_path, capfd):
    assert shared(2, phantoms, tmp_path, tmp_path / "none.pt")[0] == "ended"
    assert capfd.readouterr().err.count("none.pt: no such file") == 1
    assert shared(2, phantoms, tmp_path, weights, "--batch-size=0") == [2, 2]
    assert capfd.readouterr().err.count("--batch-size: must be at least 1") == 1


def test_torchrun_starts_it(phantoms, weights, tmp_path, monkeypatch, capfd):
    """Fork what starts the two processes, as it has imported PyTorch; they are new ones."""
    from torch.distributed import run

    monkeypatch.chdir(tmp_path)
    options = f"--images {phantoms} --weights {weights} --subset test --device cpu"
    options += f" --predictions {tmp_path / 'out'} --figure {tmp_path / 'dsc.png'}"
    words = ["--nproc-per-node=2", inference.__file__, *options.split()]
    process = FORK.Process(target=run.main, args=(words,))
    process.start()
    process.join(300)
    out, err = capfd.readouterr()
    assert process.exitcode == 0, err
    assert out.count("3 of 3 cases segmented") == 1


# Bad images


def test_bad_cases_do_not_stop_the_others(phantoms, weights, done, tmp_path, monkeypatch, capsys):
    names = [f"phantom_{i:03d}" for i in (3, 4, 5, 6)]
    images = subset_copy(phantoms, tmp_path / "images", *names)
    (images / "empty").mkdir()
    (images / "figure_1.png").write_text("lies about in the root")
    damage(images / names[1] / f"{names[1]}_5.tif")
    (images / names[2] / f"{names[2]}_4.tif").unlink()
    for path in images.glob(f"{names[3]}/*_mask.tif"):
        path.unlink()
    monkeypatch.chdir(tmp_path)
    assert infer(Path("images"), tmp_path, weights) == 1
    said = capsys.readouterr()
    first, second, third = sorted(said.err.splitlines())
    assert first.startswith("error: images/empty: holds no slice")
    assert second.startswith(f"error: images/{names[1]}/{names[1]}_5.tif: ")
    assert third.startswith(f"error: images/{names[2]}: slice 4 is missing")
    assert "2 of 5 cases" in said.out
    assert [row["case"] for row in table(tmp_path)] == [names[0]], "one has no true mask"
    for name in (names[0], names[3]):
        assert np.array_equal(read_masks(tmp_path, name), read_masks(done[0], name))
    assert not (tmp_path / "predictions" / names[1]).exists()


def test_a_blank_case_is_named_and_its_empty_mask_scores_1(weights, tmp_path, capsys):
    folder = write_case(tmp_path / "images" / "dark", np.zeros((5, 40, 48, 3), np.uint8))
    for k in range(3, 8):
        tifffile.imwrite(folder / f"scan_of_{k}_mask.tif", np.zeros((40, 48), np.uint8))
    assert infer(tmp_path / "images", tmp_path, weights) == 0
    blank, no_lesion = capsys.readouterr().err.splitlines()
    assert blank == f"{folder}: every voxel is 0, and so is its mask"
    assert no_lesion.startswith("none of the 1 true masks has a lesion")
    masks = read_masks(tmp_path, "dark")
    assert masks.shape == (5, 40, 48) and not masks.any()
    (row,) = table(tmp_path)
    assert (row["dsc"], row["iou"], row["hd95_px"]) == ("1", "1", "0")


@pytest.mark.parametrize(
    "volume, reason",
    [
        (np.full((5, 40, 40, 3), 9, np.uint8), "every voxel is 9"),
        (make_volume(1, 5, 40)[0][..., :2], r"2 channel\(s\), but the model was trained on 3"),
        (make_volume(1, 5, 40)[0][..., [0, 1, 2, 2]], r"4 channel\(s\).*trained on 3"),
        (np.full((5, 40, 40, 3), np.nan, np.float32), "NaN"),
    ],
    ids=["constant", "2 channels", "4 channels", "NaN"],
)
def test_a_volume_of_another_kind_is_one_sentence(weights, tmp_path, capsys, volume, reason):
    folder = write_case(tmp_path / "images" / "odd", volume)
    assert infer(tmp_path / "images", tmp_path, weights) == 1
    line = one_sentence(capsys)
    assert line.startswith(f"error: {folder}") and re.search(reason, line)
    assert not (tmp_path / "predictions" / "odd").exists()


def test_unknown_names_are_refused(phantoms, weights, tmp_path):
    run = tmp_path, weights
    assert "no case 'x'" in refused(phantoms, *run, "--cases", "phantom_003", "x")
    assert "no case 'x'" in refused(phantoms / "phantom_003", *run, "--cases", "x")
    assert "'rest'; known: all" in refused(phantoms, *run, "--subset", "rest")
    assert f"{tmp_path / 'x'}: no such folder" in refused(tmp_path / "x", *run)
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'}: holds no case folder" in refused(tmp_path / "empty", *run)
    assert not (tmp_path / "predictions").exists()


def test_output_that_cannot_be_written_is_one_sentence(phantoms, weights, tmp_path):
    only = weights, "--cases", "phantom_003"
    (tmp_path / "predictions").write_text("kept")
    assert str(tmp_path / "predictions") in refused(phantoms, tmp_path, *only)
    assert (tmp_path / "predictions").read_text() == "kept"
    (tmp_path / "b" / "dsc.png").mkdir(parents=True)
    assert str(tmp_path / "b" / "dsc.png") in refused(phantoms, tmp_path / "b", *only)
    assert not any((tmp_path / "b" / "predictions").iterdir()), "refused before the work"
    said = refused(phantoms, tmp_path / "c", *only, "--report", tmp_path)
    assert f"{tmp_path}: is a folder" in said
    table = tmp_path / "c" / "predictions" / "volumes.csv"
    assert "volumes.csv: is not the name of a page" in refused(
        phantoms, tmp_path / "c", *only, "--report", table
    )
    figure = phantoms / "phantom_003" / "dsc.png"  # it would be taken for a slice
    others = weights, "--cases", "phantom_001", "phantom_002"
    for option, place in (("--figure", figure), ("--report", phantoms / "pages" / "x.html")):
        said = refused(phantoms, tmp_path / "c", *others, option, place)
        assert f"{place.parent}: lies among the cases; name another place with {option}" in said
    assert not (phantoms / "pages").exists()
    picture = tmp_path / "c" / "predictions" / "phantom_003" / "phantom_003_1.png"
    said = refused(phantoms, tmp_path / "c", *only, "--figure", picture)
    assert "phantom_003_1.png: is among the pictures of a case" in said
    figure = tmp_path / "predictions" / "dsc.png"
    assert str(figure.parent) in refused(phantoms, tmp_path / "c", *only, "--figure", figure)
    assert not list(tmp_path.rglob("*_mask.tif"))
    for name in ("dsc", "dsc.xyz"):
        assert f"{name}: --figure must be" in refused(
            phantoms, tmp_path / "b", *only, "--figure", name
        )


def test_full_disk_leaves_no_half_written_case(phantoms, weights, tmp_path, monkeypatch):
    write, written = tifffile.imwrite, []

    def full_disk(path, *arguments, **options):
        written.append(path)
        if len(written) > 5:
            raise OSError(28, "No space left on device")
        return write(path, *arguments, **options)

    monkeypatch.setattr(tifffile, "imwrite", full_disk)
    message = refused(phantoms, tmp_path, weights, "--cases", "phantom_003")
    assert "phantom_003" in message and "space" in message.lower()
    names = sorted(path.name for path in (tmp_path / "predictions").iterdir())
    assert names == [".brainseg-run.lock", "args.json", "run.json"]


# Bad weights and settings


def test_weights_that_cannot_be_used_are_one_sentence(phantoms, weights, tmp_path):
    path = tmp_path / "bad.pt"
    assert str(path) in refused(phantoms, tmp_path, path), "missing"
    path.write_bytes(weights.read_bytes()[:9000])
    assert str(path) in refused(phantoms, tmp_path, path)
    path.write_bytes(weights.read_bytes())
    path.with_suffix(".json").write_text("{")
    assert str(path.with_suffix(".json")) in refused(phantoms, tmp_path, path)
    assert not (tmp_path / "predictions").exists()


@pytest.mark.parametrize(
    "flag",
    ["--threshold=0", "--threshold=1.5", "--threshold=nan", "--batch-size=0", "--workers=-1"],
)
def test_odd_numbers_are_refused(phantoms, weights, tmp_path, capsys, flag):
    assert infer(phantoms, tmp_path, weights, flag) == 2
    assert flag.split("=")[0] in capsys.readouterr().err.splitlines()[-1]


def test_image_size_and_device_are_checked(phantoms, weights, tmp_path):
    assert "40 is not a multiple of 16" in refused(phantoms, tmp_path, weights, "--image-size", 40)
    assert "'nowhere'" in refused(phantoms, tmp_path, weights, "--device", "nowhere")
    if not torch.cuda.is_available():
        assert "'cuda' is not available" in refused(phantoms, tmp_path, weights, "--device", "cuda")


def test_neighbours_are_read_from_the_card(phantoms, tmp_path, capsys):
    import train

    few = subset_copy(phantoms, tmp_path / "few", "phantom_001", "phantom_003", "phantom_005")
    options = ["--features", "4", "--image-size", "32", "--epochs", "1", "--neighbours", "1"]
    options += ["--drop-sequences", "0.2", "--aug-intensity", "0.1", "--weights", str(tmp_path)]
    train.main(["--images", str(few), *options, "--logs", str(tmp_path / "logs")])
    only = "--cases", "phantom_003"
    assert infer(phantoms, tmp_path, tmp_path / "unet.pt", *only) == 0
    (tmp_path / "unet.json").unlink()  # without it, nothing says that 9 channels are 3 slices
    capsys.readouterr()
    assert infer(phantoms, tmp_path, tmp_path / "unet.pt", *only, "--image-size", 32) == 1
    first, second = capsys.readouterr().err.strip().splitlines()
    assert "has no card (.json)" in first
    assert "3 channel(s), but the model was trained on 9" in second


def test_the_second_network_trains_and_segments_by_name(phantoms, tmp_path, monkeypatch):
    """Use one block per layer instead of sixteen in all, as saving those takes longest."""
    import train
    from brainseg import resnext_unet

    layer = resnext_unet._layer
    monkeypatch.setattr(resnext_unet, "_layer", lambda i, o, blocks, stride: layer(i, o, 1, stride))
    few = subset_copy(phantoms, tmp_path / "few", "phantom_001", "phantom_005")
    options = ["--model", "resnext_unet", "--image-size", "32", "--epochs", "1", "--folds", "2"]
    options += ["--fold", "0", "--weights", str(tmp_path), "--logs", str(tmp_path / "logs")]
    train.main(["--images", str(few), *options])
    only = "--cases", "phantom_003"
    assert infer(phantoms, tmp_path, tmp_path / "resnext_unet.pt", *only) == 0


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Make threads take turns, as on a GPU."""
    made = Segmenter.__init__

    def init(self, *args, **options):
        made(self, *args, **options)
        self.on_cpu, self.batch_size = False, options["batch_size"]

    monkeypatch.setattr(Segmenter, "__init__", init)


def test_a_gpu_takes_one_case_at_a_time(
    phantoms, weights, done, tmp_path, monkeypatch, as_on_a_gpu
):
    forward, at_work, most = Segmenter._network, [], []

    def slowly(self, batch):
        at_work.append(batch)
        time.sleep(0.01)
        most.append(len(at_work))
        result = forward(self, batch)
        at_work.pop()
        return result

    monkeypatch.setattr(Segmenter, "_network", slowly)
    words = "--batch-size", 5, "--workers", 4, "--no-amp", "--subset", "train", "--no-pictures"
    assert infer(phantoms, tmp_path, weights, *words) == 0
    names = sorted(path.name for path in (tmp_path / "predictions").glob("phantom_*"))
    assert max(most) == 1 and len(most) == 2 * len(names) == 16, "two batches a case"
    for name in names:
        assert dsc(read_masks(tmp_path, name) > 0, read_masks(done[0], name) > 0) > 0.99


def bound_batches(monkeypatch, most: list[int]) -> None:
    """Let more than most[0] slices at once not fit into the memory."""
    forward = Segmenter._network

    def small(self, batch):
        if len(batch) > most[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, batch)

    monkeypatch.setattr(Segmenter, "_network", small)


def test_running_out_of_memory_loses_no_case(
    phantoms, weights, done, tmp_path, monkeypatch, as_on_a_gpu
):
    bound_batches(monkeypatch, [3])
    names = "phantom_003", "phantom_004"
    assert infer(phantoms, tmp_path, weights, "--no-pictures", "--cases", *names) == 0
    for name in names:
        assert dsc(read_masks(tmp_path, name) > 0, read_masks(done[0], name) > 0) > 0.99


def test_a_batch_too_large_for_the_memory_is_halved(
    phantoms, weights, done, tmp_path, monkeypatch, capsys
):
    most = [1]
    bound_batches(monkeypatch, most)
    only = "--cases", "phantom_003"
    assert infer(phantoms, tmp_path, weights, *only) == 0
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 2 and said[1].endswith("--batch-size 2; continuing with 1")
    assert np.array_equal(read_masks(tmp_path, "phantom_003"), read_masks(done[0], "phantom_003"))
    most[0] = 0
    assert "not even one slice fits" in refused(phantoms, tmp_path, weights, *only)
