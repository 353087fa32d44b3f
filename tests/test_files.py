"""Test that files are written whole or not at all."""

import os

import pytest

from brainseg.io.files import atomic_write


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
            assert temporary.parent == path.parent, "renaming is atomic on one file system only"
            assert temporary.suffix == ".json", "imageio and matplotlib go by the suffix"
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
