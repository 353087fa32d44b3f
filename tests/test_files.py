"""Test that files are written whole or not at all, and that only our own are deleted."""

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import FORK, ROOT, file_limit

from brainseg.io import files
from brainseg.io.files import (
    MARK,
    OWNER,
    RUN,
    atomic_write,
    clear_leftovers,
    has_mark,
    locked,
    remove,
    save_array,
    scratch,
)


@pytest.mark.parametrize("missing", [1, 100, 4000, 9000])
def test_an_array_that_does_not_fit_is_an_error(tmp_path, missing):
    path, array = tmp_path / "a.npy", np.ones(100_000, np.uint8)
    save_array(path, array)
    whole = path.stat().st_size
    with file_limit(whole - missing), pytest.raises(OSError):
        save_array(path, array)
    with file_limit(whole):
        save_array(path, array)
    assert np.array_equal(np.load(path), array)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [b"old", None])
def test_failed_write_keeps_the_old_file(tmp_path, old, error):
    path = tmp_path / "weights.pt"
    if old:
        path.write_bytes(old)
    with pytest.raises(type(error)), atomic_write(path) as temporary:
        temporary.write_bytes(b"half of the ne")
        raise error
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([old] if old else [])


def test_whole_write_replaces_the_old_file_at_the_end_only(tmp_path):
    path = tmp_path / "new" / "folder" / "card.json"
    for text in ("first", "second"):
        before = path.read_text() if path.exists() else None
        with atomic_write(str(path)) as temporary:
            assert path.parent in temporary.parents, "renaming is atomic on one file system only"
            assert temporary.name == path.name, "torch.save writes the name into the file"
            temporary.write_text(text)
            assert (path.read_text() if path.exists() else None) == before
        assert path.read_text() == text
        assert list(path.parent.iterdir()) == [path]


def test_whole_write_obeys_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_write(tmp_path / "file") as temporary:
            temporary.write_text("x")
        assert os.umask(0o027) == 0o027
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def leave_scratch(folder: Path) -> None:
    """Kill a process while it writes."""

    def write() -> None:
        with scratch(folder) as inner:
            (inner / "half").write_text("x")
            os.kill(os.getpid(), signal.SIGKILL)

    writer = FORK.Process(target=write)
    writer.start()
    writer.join()
    assert writer.exitcode == -signal.SIGKILL


def test_leftovers_of_a_killed_process_are_cleared(tmp_path):
    leave_scratch(tmp_path)
    (left,) = tmp_path.iterdir()
    clear_leftovers(tmp_path)
    assert not left.exists()


def test_scratch_of_a_live_process_or_of_another_machine_stays(tmp_path):
    with scratch(tmp_path) as live, scratch(tmp_path) as elsewhere:
        owner = json.loads((elsewhere / OWNER).read_text())
        (elsewhere / OWNER).write_text(json.dumps(owner | {"machine": "another", "process": 1}))
        clear_leftovers(tmp_path)
        assert live.exists() and elsewhere.exists()
        long_ago = time.time() - 2 * files.DAY
        os.utime(elsewhere / OWNER, (long_ago, long_ago))
        clear_leftovers(tmp_path)
        assert live.exists() and not elsewhere.exists()
    assert not any(tmp_path.iterdir())


def test_folders_that_only_look_like_leftovers_stay(tmp_path):
    for name, owner in ((".brainseg-1", None), (".brainseg-2", "{}"), (".brainseg-3", "[1]")):
        (tmp_path / name).mkdir()
        if owner:
            (tmp_path / name / OWNER).write_text(owner)
    clear_leftovers(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(
    "name, content",
    [
        ("mask.nii.gz", "x" * 148 + MARK + "x" * 100),
        ("page.html", f"<meta name=generator content='{MARK}'>"),
        ("volumes.csv", f"case,{RUN}\na,1\n"),
    ],
)
def test_only_what_has_our_mark_is_removed(tmp_path, name, content):
    ours, foreign = tmp_path / name, tmp_path / f"other_{name}"
    pack = gzip.compress if name.endswith(".gz") else bytes
    ours.write_bytes(pack(content.encode()))
    foreign.write_bytes(pack(content.replace(MARK, "x").replace(RUN, "x").encode()))
    remove(ours)
    assert not ours.exists()
    with pytest.raises(ValueError, match=f"other_{name}: is in the way"):
        remove(foreign)
    assert foreign.exists()
    remove(tmp_path / "missing")


def test_words_of_others_in_a_table_are_no_mark(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text(f"case,dsc\n{MARK},{RUN}\n")
    assert not has_mark(path)


def test_a_folder_is_locked_until_its_process_ends(tmp_path):
    def hold() -> None:
        with locked(tmp_path, "--predictions"):
            (tmp_path / "held").touch()
            time.sleep(60)

    other = FORK.Process(target=hold)
    other.start()
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(ValueError, match="another run is writing there.*--predictions"):
        with locked(tmp_path, "--predictions"):
            pass
    with locked(tmp_path, "--predictions", name="other"):
        pass
    other.kill()
    other.join()
    with locked(tmp_path, "--predictions"):
        pass


def test_a_lock_reaches_all_who_may_write_to_the_folder(tmp_path):
    for mode, expected in ((0o755, 0o644), (0o775, 0o664), (0o777, 0o666)):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        with locked(folder, "--predictions"):
            (lock,) = folder.iterdir()
            assert lock.stat().st_mode & 0o777 == expected


def test_a_lock_that_cannot_be_opened_is_not_passed_over(tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(files.FileLock, "acquire", refuse)
    with pytest.raises(OSError, match="run.lock: belongs to another user.*--predictions"):
        with locked(tmp_path, "--predictions"):
            pass


def test_readers_are_quiet_only_while_they_read():
    """Neither import nor reading changes the warnings and loggers of a user's process."""
    code = """if True:
        import logging, warnings
        from concurrent.futures import ThreadPoolExecutor
        import brainseg.io.dicom_seg, brainseg.io.layouts, brainseg.io.pictures
        from brainseg.io.quiet import LOGGING, WARNING, quiet

        def silenced():
            levels = {name: logging.getLogger(name).level for name in LOGGING}
            loggers = [name for name in LOGGING if levels[name] == logging.CRITICAL]
            patterns = [getattr(each[3], "pattern", "") for each in warnings.filters]
            return loggers, [name for name in WARNING if name in patterns]

        def read(_):
            with quiet, quiet:
                assert silenced() == ([*LOGGING], [*WARNING])

        assert silenced() == ([], []), "imported"
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(1000)))
        assert silenced() == ([], []), "read"
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
