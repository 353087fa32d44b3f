"""--images scans.zip: unpacked into a temporary folder that goes with the run, or refused."""

import os
import shutil
import stat
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import contents
from test_inference import infer

from brainseg.cache import Prepared, prepare, prune
from brainseg.io.archives import unpacked
from brainseg.io.layouts import list_cases


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def archive_of(path: Path, members: dict, flags: int = 0) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    if flags:
        content = bytearray(path.read_bytes())
        content[6] |= flags  # of the first member, and in the directory
        content[content.index(b"PK\1\2") + 8] |= flags
        path.write_bytes(content)
    return path


@pytest.mark.parametrize("top", ["", "cohort/"])
def test_masks_of_a_zip_are_those_of_its_folder(two, weights, tmp_path, temporary, top):
    members = {f"{top}{name}": content for name, content in contents(two).items()}
    members |= {"__MACOSX/._x": b"x", f"{top}empty/": b""}
    path = archive_of(tmp_path / "scans.zip", members)
    for images, out in ((two, "folder"), (path, "zip")):
        (tmp_path / out).mkdir()
        assert infer(images, tmp_path / out, weights) == 0
    folder, unzipped = (contents(tmp_path / out / "predictions") for out in ("folder", "zip"))
    assert folder.pop("args.json") != unzipped.pop("args.json")
    assert folder == unzipped and not list(temporary.iterdir())


def test_one_case_in_a_zip_is_named_after_it(two, weights, tmp_path):
    slices = contents(two / "phantom_001")
    assert infer(archive_of(tmp_path / "p 7.zip", slices), tmp_path, weights) == 0
    assert "\np 7," in (tmp_path / "predictions" / "volumes.csv").read_text()


def test_errors_name_the_archive_and_the_file_in_it(two, weights, tmp_path, temporary, capsys):
    members = contents(two)
    members["phantom_001/phantom_001_3.tif"] = b"no image"
    path = archive_of(tmp_path / "scans.zip", members)
    infer(path, tmp_path, weights)
    said = capsys.readouterr().err + (tmp_path / "predictions" / "volumes.csv").read_text()
    assert said.count(f"{path}/phantom_001/phantom_001_3.tif: ") == 2
    assert str(temporary) not in said


def test_volumes_of_a_zip_are_preprocessed_once(two, tmp_path, monkeypatch):
    path, cache = archive_of(tmp_path / "scans.zip", contents(two)), tmp_path / "cache"

    def prepared() -> list[Prepared]:
        with unpacked(path) as images:
            return prepare([source.open() for source in list_cases(images)], 32, cache, workers=1)

    first = prepared()
    monkeypatch.setattr("brainseg.cache.preprocess", None)  # it would fail
    for one, other in zip(first, prepared(), strict=True):
        assert np.array_equal(one.images, other.images)
    assert prune(cache).startswith("cache: deleted 0 ")
    os.utime(path, (0, 0))  # as if it were another
    with pytest.raises(ValueError, match="NoneType"):
        prepared()
    path.unlink()
    assert prune(cache).startswith("cache: deleted 2 ")


def symlink() -> zipfile.ZipInfo:
    link = zipfile.ZipInfo("link.tif")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    return link


@pytest.mark.parametrize(
    ("members", "flags", "fault"),
    [
        ({"a/../../b.tif": b"x"}, 0, "leads out of it"),
        ({"/b.tif": b"x"}, 0, "leads out of it"),
        ({"a\\..\\..\\b.tif": b"x"}, 0, "leads out of it"),
        ({symlink(): b"/etc/passwd"}, 0, "leads out of it"),
        ({"a.tif": b"x"}, 1, "is damaged, encrypted"),
        ({"a\\b.tif": b"x", "a/b.tif": b"x"}, 0, "contains a/b.tif twice"),
        ({"a/": b""}, 0, "contains no file"),
        ({"a": b"x", "a/b": b"x"}, 0, "is damaged"),
    ],
)
def test_an_unsafe_zip_is_refused(members, flags, fault, weights, tmp_path, temporary):
    path = archive_of(tmp_path / "bad.zip", members, flags)
    said = infer(path, tmp_path, weights)
    assert said.startswith(f"error: {path}: ") and fault in said and said.count("\n") == 0
    assert not list(temporary.iterdir()) and not (tmp_path / "predictions").exists()


def test_a_damaged_zip_is_refused(two, weights, tmp_path, temporary):
    whole = archive_of(tmp_path / "whole.zip", contents(two)).read_bytes()
    changed = bytearray(whole)
    changed[300:340] = bytes(40)
    path = tmp_path / "bad.zip"
    for content in (b"no archive", whole[: len(whole) // 2], bytes(changed)):
        path.write_bytes(content)
        assert f"error: {path}: is damaged" in infer(path, tmp_path, weights)
    assert not list(temporary.iterdir())


def test_a_zip_too_large_for_the_disk_is_refused(tmp_path, temporary, monkeypatch):
    path = archive_of(tmp_path / "large.zip", {"a.tif": bytes(10**6)})
    free = shutil.disk_usage(tmp_path)._replace(free=10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    with pytest.raises(ValueError, match="GiB unpacked"), unpacked(path):
        pass
    assert not list(temporary.iterdir())
