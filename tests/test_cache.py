"""Test preprocessed volumes on disk: found again, never trusted blindly."""

import errno
import json
import os
import shutil
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
from conftest import SIZE, open_all, same

from brainseg.cache import prepare, prune
from brainseg.io.files import default_cache
from brainseg.io.layouts import find_case, find_cases
from brainseg.io.slices import Case
from brainseg.preprocess import preprocess
from dataset import BrainSegmentationDataset


@pytest.fixture
def reads(monkeypatch) -> list[str]:
    """Return the cases whose sources are read, in order of reading."""
    names, read = [], Case.read

    def noted(case: Case) -> np.ndarray:
        names.append(case.name)
        return read(case)

    monkeypatch.setattr(Case, "read", noted)
    return names


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("ITK ERROR: singular matrix")])
def test_what_a_library_cannot_do_is_the_fault_of_its_case(two, monkeypatch, capsys, error):
    read = Case.read

    def first_fails(self):
        if self.name == "phantom_001":
            raise error
        return read(self)

    monkeypatch.setattr(Case, "read", first_fails)
    cases = find_cases(two)
    with pytest.raises(ValueError, match=f"{two / 'phantom_001'}: "):
        prepare(cases, 32, two.parent / "cache")
    (left,) = prepare(cases, 32, two.parent / "cache", skip_bad=True)
    assert left.name == "phantom_002" and f"left out: {two}" in capsys.readouterr().err


def test_second_opening_reads_no_source(two, monkeypatch):
    first = open_all(two)

    def fail(case):
        raise AssertionError(f"{case.name} was read again")

    monkeypatch.setattr(Case, "read", fail)
    monkeypatch.setattr(Case, "read_mask", fail)
    assert same(open_all(two), first)


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_cache_is_mapped_half_precision_and_closed(two):
    """Once, 400 cases at `ulimit -n 1024` failed, with advice about disk space."""
    open_all(two)
    before = open_files()
    data = BrainSegmentationDataset(two, "all", SIZE, cache=two.parent / "cache")
    assert open_files() == before
    mapped = Path("/proc/self/maps").read_text()
    for volume in data.volumes:
        assert volume.images.dtype == np.float16 and volume.mask.dtype == bool
    for name in ("images", "mask", "truth"):
        assert mapped.count(f"/{name}.npy") >= 2


def test_entries_of_older_versions_are_read_whole_once(two, reads):
    """They lack the size and time of their files and the place of their source."""
    first, cache = open_all(two), two.parent / "cache"
    paths = sorted(cache.glob("*/entry.json"))
    for path in paths:
        about = json.loads(path.read_text())
        old = {name: about[name] for name in ("fingerprint", "frame", "checksums")}
        path.write_text(json.dumps(old))
    reads.clear()
    assert "deleted 0 volumes" in prune(cache)
    assert same(open_all(two), first) and reads == []
    assert all({"stats", "source"} <= json.loads(path.read_text()).keys() for path in paths)


def test_warm_start_reads_only_the_ends_of_files(two, monkeypatch):
    first = open_all(two)
    monkeypatch.setattr("brainseg.cache._checksum", None)
    assert same(open_all(two), first)


def test_a_copied_cache_is_read_whole_and_used(two, reads):
    first = open_all(two)
    shutil.copytree(two.parent / "cache", two.parent / "copy", copy_function=shutil.copyfile)
    reads.clear()
    assert same(open_all(two, cache=two.parent / "copy"), first) and reads == []


def test_an_entry_full_of_zeros_is_rebuilt(two, reads):
    """A power cut may leave such a file, of the right size and time."""
    first = open_all(two)
    (path,) = two.parent.glob("cache/phantom_002-*/truth.npy")
    about = path.stat()
    path.write_bytes(bytes(about.st_size))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    reads.clear()
    assert same(open_all(two), first) and reads == ["phantom_002"]


def test_only_entries_of_deleted_sources_are_pruned(two):
    """Once, a .git and a .ssh of two days' age were deleted."""
    first, cache = open_all(two), two.parent / "cache"
    (entry,) = cache.glob("phantom_002-*")
    others = [cache / name for name in (".git", ".ssh", "empty", "phantom_002-0123456789abcdef")]
    for folder in others:
        folder.mkdir()
    for folder in (cache / ".git", cache / ".ssh", others[-1]):
        (folder / "entry.json").write_text('{"fingerprint": "x", "source": "/gone"}')
    os.utime(cache / ".git", (1, 1))
    os.utime(cache / ".ssh", (1, 1))
    others.append(shutil.copytree(entry, cache / "with a note"))
    (cache / "with a note" / "note.txt").write_text("mine")
    others.append(shutil.copytree(entry, cache / "of another program"))
    (cache / "of another program" / "entry.json").write_text('{"source": "/gone"}')
    before = sorted(path for folder in others for path in folder.rglob("*"))
    shutil.rmtree(two / "phantom_002")
    assert prune(cache).startswith("cache: deleted 1 volumes")
    assert not entry.exists() and len(before) == 12
    assert sorted(path for folder in others for path in folder.rglob("*")) == before
    assert all(folder.is_dir() for folder in others)
    assert same(open_all(two), first[:8])
    assert "deleted 0 volumes" in prune(two.parent / "none")


def test_nothing_is_written_beside_the_data(two):
    """A read-only data folder is fine."""

    def contents() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in (two, *two.rglob("*"))}

    before = contents()
    open_all(two)
    assert contents() == before


@pytest.mark.parametrize("name", ["phantom_002_4.tif", "phantom_002_4_mask.tif"])
def test_touched_source_is_read_again(two, reads, name):
    first = open_all(two)
    os.utime(two / "phantom_002" / name, ns=(1, 1_700_000_000_000_000_000))
    reads.clear()
    assert same(open_all(two), first)
    assert reads == ["phantom_002"], "and no other case"


@pytest.mark.parametrize("name", ["phantom_002_4.tif", "phantom_002_4_mask.tif"])
def test_rewritten_source_is_never_served_stale(two, name):
    first = open_all(two)
    path = two / "phantom_002" / name
    time = path.stat().st_mtime_ns
    iio.imwrite(path, 255 - iio.imread(path))
    os.utime(path, ns=(time, time + 1_000_000))  # a millisecond later
    again = open_all(two)
    assert same(again[:8], first[:8]) and not same(again[8:], first[8:])


def test_added_slice_is_noticed(two):
    open_all(two)
    for end in (".tif", "_mask.tif"):
        shutil.copy(
            two / f"phantom_001/phantom_001_8{end}", two / f"phantom_001/phantom_001_9{end}"
        )
    assert len(open_all(two)) == 17


def test_versions_of_preprocessing_are_kept_apart(two, reads):
    old, new = open_all(two, version=1), open_all(two)
    reads.clear()
    assert same(open_all(two, version=1), old) and same(open_all(two), new)
    assert reads == [] and not same(old, new)


def test_image_sizes_are_kept_apart(two, reads):
    small, large = open_all(two, 16), open_all(two, 48)
    assert small[0][0].shape == (3, 16, 16) and large[0][0].shape == (3, 48, 48)
    reads.clear()
    assert same(open_all(two, 16), small) and same(open_all(two, 48), large)
    assert reads == []


def test_cases_of_one_name_in_two_folders_are_kept_apart(two):
    other = two.parent / "other"
    shutil.copytree(two, other)
    for path in other.glob("*/*[0-9].tif"):
        iio.imwrite(path, 255 - iio.imread(path))
    first, second = open_all(two), open_all(other)
    assert not same(first, second)
    assert same(open_all(two), first) and same(open_all(other), second)


def of_reader(case: Case, folder: Path, masks: list[np.ndarray]) -> Case:
    """Write the masks of a reader, the files as alike as zip leaves them, and return the case."""
    folder.mkdir()
    paths = tuple(folder / path.name for path in case.masks)
    for path, mask in zip(paths, masks, strict=True):
        iio.imwrite(path, mask)
        os.utime(path, (1_700_000_000, 1_700_000_000))
    return Case(case.name, case.numbers, case.slices, paths)


@pytest.mark.parametrize("linked", [False, True])
def test_masks_of_two_readers_are_never_mixed(two, linked):
    """Files of one name, size and time, in two folders or behind one link."""
    case, cache = find_case(two / "phantom_001"), two.parent / "cache"
    masks = [iio.imread(path) for path in case.masks]
    one = of_reader(case, two.parent / "A", masks)
    other = of_reader(case, two.parent / "B", masks[::-1])
    assert [p.stat().st_size for p in one.masks] == [p.stat().st_size for p in other.masks]
    if linked:
        link = two.parent / "reader"
        cases = []
        for folder in ("A", "B"):
            masks = tuple(link / path.name for path in case.masks)
            cases.append((folder, Case(case.name, case.numbers, case.slices, masks)))
    else:
        cases = [("A", one), ("B", other)]
    for folder, chosen in cases * 2:
        if linked:
            link.unlink(missing_ok=True)
            link.symlink_to(two.parent / folder)
        (made,) = prepare([chosen], SIZE, cache)
        assert np.array_equal(made.truth, {"A": one, "B": other}[folder].read_mask())
    assert len(list(cache.iterdir())) == 2, "both are kept"


def test_entries_follow_the_umask(two):
    """A cache on a shared disk is for all who may read it."""
    old = os.umask(0o027)
    try:
        open_all(two)
    finally:
        os.umask(old)
    for entry in (two.parent / "cache").iterdir():
        assert entry.stat().st_mode & 0o777 == 0o750
        assert {path.stat().st_mode & 0o777 for path in entry.iterdir()} == {0o640}


def test_a_cache_of_another_user_is_read_or_refused(two, monkeypatch):
    def not_permitted(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    first, cache = open_all(two), two.parent / "cache"
    monkeypatch.setattr("brainseg.cache.scratch", not_permitted)
    assert same(open_all(two), first)
    os.utime(two / "phantom_001" / "phantom_001_4.tif", (1, 1))
    with pytest.raises(ValueError, match=f"{cache}: cannot keep .*denied.*folder with --cache"):
        open_all(two)


def test_a_stale_entry_with_files_of_others_stays(two):
    open_all(two)
    (entry,) = (two.parent / "cache").glob("phantom_002-*")
    (entry / "note.txt").write_text("mine")
    os.utime(two / "phantom_002" / "phantom_002_4.tif", (1, 1))
    with pytest.raises(ValueError, match=f"{entry}: is in the way, and was not written by"):
        open_all(two)
    assert (entry / "note.txt").read_text() == "mine" and (entry / "images.npy").exists()


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def change_frame(path: Path) -> None:
    about = json.loads(path.read_text())
    about["frame"]["box"][0] += 1
    path.write_text(json.dumps(about))


DAMAGE = {
    "flipped bit in the images": lambda entry: flip_a_byte(entry / "images.npy"),
    "flipped bit in the masks": lambda entry: flip_a_byte(entry / "mask.npy"),
    "flipped bit in the truth": lambda entry: flip_a_byte(entry / "truth.npy"),
    "truncated images": lambda entry: cut(entry / "images.npy"),
    "empty images": lambda entry: (entry / "images.npy").write_bytes(b""),
    "missing masks": lambda entry: (entry / "mask.npy").unlink(),
    "missing entry.json": lambda entry: (entry / "entry.json").unlink(),
    "truncated entry.json": lambda entry: cut(entry / "entry.json"),
    "empty entry.json": lambda entry: (entry / "entry.json").write_bytes(b""),
    "another entry.json": lambda entry: (entry / "entry.json").write_text("[1, 2]"),
    "binary entry.json": lambda entry: (entry / "entry.json").write_bytes(b"\xff\xfe\0" * 9),
    "changed frame": lambda entry: change_frame(entry / "entry.json"),
    "empty folder": lambda entry: [path.unlink() for path in entry.iterdir()],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_entry_is_rebuilt(two, reads, damage):
    cache = two.parent / "cache"
    first = open_all(two)
    (entry,) = cache.glob("phantom_002-*")
    damage(entry)
    reads.clear()
    again = BrainSegmentationDataset(two, "all", SIZE, cache=cache)
    assert reads == ["phantom_002"]
    assert same([*again], first)
    assert again.volumes[1].frame == preprocess(again.volumes[1].case.read(), SIZE)[1]
    reads.clear()
    assert same(open_all(two), first) and reads == [], "the rebuilt entry is sound"
    assert sorted(path.name[:11] for path in cache.iterdir()) == ["phantom_001", "phantom_002"]


@pytest.mark.parametrize("below", ["", "deeper/cache"])
def test_unusable_cache_folder_is_refused_by_name(two, below):
    (two.parent / "file").write_text("kept")
    cache = two.parent / "file" / below
    with pytest.raises(ValueError, match=f"{cache}: cannot be created; .* --cache"):
        open_all(two, cache=cache)
    assert (two.parent / "file").read_text() == "kept"


def test_full_disk_is_one_sentence_and_leaves_nothing_half_done(two, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = two.parent / "cache"
    with monkeypatch.context() as patch:
        patch.setattr("brainseg.cache.np.save", full)
        with pytest.raises(ValueError, match=f"{cache}: cannot keep .*No space left on device"):
            open_all(two)
    assert list(cache.iterdir()) == []
    assert len(open_all(two)) == 16


def test_default_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache() == tmp_path / "brainseg"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_cache() == Path.home() / ".cache" / "brainseg"
