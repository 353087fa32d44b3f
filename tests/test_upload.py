"""Test untrusted uploads: unpacked safely, read in a separate process, or refused."""

import asyncio
import errno
import io
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
import zipfile
import zlib
from concurrent.futures import CancelledError, Future
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import nibabel
import numpy as np
import pytest
import tifffile

from brainseg.phantom import make_volume
from brainseg.segmenter import Segmenter
from brainseg.unet import UNet

pytest.importorskip("starlette", reason="pip install -r requirements-app.txt")

from starlette.datastructures import UploadFile

from server import unpacking, uploads
from server.answers import Loaded
from server.api import lines, make_app
from server.jobs import Job, Reader, Service, Unavailable
from server.unpacking import MIB, Limits
from server.uploads import attend

httpx = pytest.importorskip("httpx")
LIMITS = Limits()


@pytest.fixture(scope="module")
def phantom():
    return make_volume(0, slices=4, size=32)


def tiff(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image)
    return buffer.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def named(**files: bytes) -> list[UploadFile]:
    return [UploadFile(io.BytesIO(content), filename=name) for name, content in files.items()]


def volume_file(array: np.ndarray, path: Path) -> bytes:
    import SimpleITK

    image = SimpleITK.GetImageFromArray(array, isVector=array.ndim == 4)
    SimpleITK.WriteImage(image, str(path))
    return path.read_bytes()


@pytest.fixture(scope="module")
def service():
    """Return a server's queue, with the process that reads for nearly all of the tests."""
    service = make_service()
    yield service
    service.close()


def make_service(**options) -> Service:
    segmenter = Segmenter(UNet(init_features=2), image_size=32, device="cpu", **options)
    return Service(segmenter, LIMITS)


@pytest.fixture
def process(service):
    return service.reader


@pytest.fixture
def receive(process, tmp_path, monkeypatch):
    """Return a function that reads an upload as the server does."""

    def receive(parts, limits=LIMITS) -> Loaded:
        folder = tmp_path / "folder"
        folder.mkdir()
        monkeypatch.setattr(process, "limits", limits)
        return process.read(parts, folder)

    return receive


def slices_of(phantom, prefix: str = "") -> dict[str, bytes]:
    volume, mask = phantom
    files = {}
    for k in range(len(volume)):
        files[f"{prefix}head_{k + 1}.tif"] = tiff(volume[k])
        files[f"{prefix}head_{k + 1}_mask.tif"] = tiff(mask[k] * np.uint8(255))
    return files


# What is accepted


@pytest.mark.parametrize("kind", ["files", "archive", "archive of a folder"])
def test_slices_and_archives_of_them(phantom, receive, kind):
    prefix = {"archive of a folder": "some/folder/"}.get(kind, "")
    files = slices_of(phantom, prefix) | {".DS_Store": b"x", f"{prefix}._head_1.tif": b"x"}
    if kind != "files":
        files |= {"__MACOSX/._head_1.tif": b"x", "notes.csv": b"a,b"}
    images = named(**files) if kind == "files" else named(**{"scan.zip": zipped(files)})
    loaded = receive({"images": images})
    assert loaded.case.name == "head"
    assert np.array_equal(loaded.volume, phantom[0])
    assert np.array_equal(loaded.truth, phantom[1])


def test_masks_of_slices_may_be_sent_separately(phantom, receive):
    files = slices_of(phantom)
    images = {name: content for name, content in files.items() if "mask" not in name}
    masks = {name: content for name, content in files.items() if "mask" in name}
    loaded = receive({"images": named(**images), "mask": named(**{"m.zip": zipped(masks)})})
    assert np.array_equal(loaded.truth, phantom[1])


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha"])
def test_a_volume_file_with_its_mask(phantom, receive, tmp_path, suffix):
    volume, mask = phantom
    name = f"a b{suffix}"
    scan = volume_file(volume, tmp_path / f"scan{suffix}")
    truth = volume_file(mask.astype(np.uint8), tmp_path / "truth.nii.gz")
    parts = {"images": named(**{name: scan}), "mask": named(**{"odd name.nii.gz": truth})}
    loaded = receive(parts)
    assert loaded.case.name == "a b"
    assert np.array_equal(loaded.volume, volume) and np.array_equal(loaded.truth, mask)


def test_sequences_in_separate_files(phantom, receive, tmp_path):
    volume, _ = phantom
    sent = {
        name: named(**{"scan.nii.gz": volume_file(volume[..., k], tmp_path / f"{name}.nii.gz")})
        for k, name in enumerate(("pre", "flair", "post"))
    }
    assert np.array_equal(receive(sent).volume, volume)


@pytest.mark.parametrize("packed", [True, False])
def test_a_dicom_series(phantom, receive, tmp_path, packed):
    from test_scan import write_series

    flair = phantom[0][..., 1]
    files = {p.name: p.read_bytes() for p in write_series(tmp_path / "series", flair).iterdir()}
    if packed:
        files = {"scan.zip": zipped({f"series/{name}": files[name] for name in files})}
    loaded = receive({"images": named(**files)})
    assert np.array_equal(loaded.volume, flair[..., None].repeat(3, axis=3))
    assert loaded.case.spacing is not None
    if packed:
        assert loaded.case.name == "series"


@pytest.mark.parametrize("packed", [True, False])
def test_a_study_in_folders_whose_files_share_names(phantom, receive, tmp_path, packed):
    """Send a study as the page does when it is dropped: each file with its path."""
    from test_scan import write_series

    files = {}
    for k, words in enumerate(("T1 pre", "FLAIR", "T1 post gd")):
        tags = {"PatientID": "p1", "FrameOfReferenceUID": "1.2.4"}
        tags |= {"SeriesDescription": words, "SeriesNumber": k}
        folder = write_series(tmp_path / words, phantom[0][..., k], f"1.2.3.{k}", **tags)
        for path in folder.iterdir():
            files[f"study/{words}/{path.name}"] = path.read_bytes()
    assert len({name.rpartition("/")[2] for name in files}) == len(files) // 3, "as in the title"
    if packed:
        files = {"scan.zip": zipped(files)}
    loaded = receive({"images": named(**files)})
    assert np.array_equal(loaded.volume, phantom[0]) and loaded.case.name == "study"


@pytest.mark.parametrize("kind", ["one archive", "two archives", "files", "side by side"])
def test_several_studies_are_told_apart(receive, tmp_path, kind):
    """Send two MR studies without a PatientID, a CT study, and a file that is not an image."""
    from test_studies import image

    places = {"_b_2015-03-02/x/y": "20150302", "_b_2014-03-02" + 12 * "/x": "20140302"}
    if kind == "two archives":
        places = {"b_2015-03-02": "20150302", "b_2014-03-02": "20140302"}
    files = {}
    for place, date in places.items():
        path = image(tmp_path / place / "1", "anonymous", date=date)
        files[f"{place}/1"] = path.read_bytes()
    if kind == "two archives":
        images = named(**{f"{place}.zip": zipped({"1": files[f"{place}/1"]}) for place in places})
    else:
        ct = image(tmp_path / "ct", "anonymous", study="2", Modality="CT")
        files |= {"c/1": ct.read_bytes(), "c/readme.txt": b"x"}
        if kind == "side by side":
            files = {f"in/{k}": content for k, content in enumerate(files.values())}
        images = named(**({"all.zip": zipped(files)} if kind == "one archive" else files))
    scans = sorted(receive({"images": images}), key=lambda scan: scan.name)
    names = ["b_2014-03-02", "b_2015-03-02"]
    if kind == "side by side":
        names = ["in_20140302", "in_20150302"]
    assert [scan.name for scan in scans] == names
    assert {scan.patient for scan in scans} == {names[0].partition("_")[0]}
    folders = [path.parent.name for path in (tmp_path / "folder").glob("[01]/received/*")]
    assert folders == 2 * ["received"]


def test_a_mask_beside_sequences_is_not_a_sequence(phantom, receive, tmp_path):
    volume, mask = phantom
    sent = {
        name: named(**{"scan.nii.gz": volume_file(volume[..., k], tmp_path / f"{name}.nii.gz")})
        for name, k in (("flair", 1), ("post", 2))
    }
    truth = volume_file(mask.astype(np.uint8), tmp_path / "truth.nii.gz")
    loaded = receive(sent | {"mask": named(**{"truth.nii.gz": truth})})
    assert loaded.case.name == "scan"
    assert np.array_equal(loaded.volume, volume[..., [1, 1, 2]])
    assert np.array_equal(loaded.truth, mask)


def test_flair_alone(phantom, receive, tmp_path):
    flair = volume_file(phantom[0][..., 1], tmp_path / "flair.nii.gz")
    loaded = receive({"flair": named(**{"a_t1.nii.gz": flair})})
    assert np.array_equal(loaded.volume, phantom[0][..., [1, 1, 1]])
    assert loaded.notes == ["FLAIR stands in for pre-contrast and post-contrast"]
    assert "says 't1': check the order" in loaded.case.doubts[0], "its name is of another sequence"


def test_a_name_cannot_leave_the_folder(phantom, receive, tmp_path):
    scan = volume_file(phantom[0], tmp_path / "scan.nii.gz")
    loaded = receive({"images": named(**{"../../..\\x/<b>:|\n.nii.gz": scan})})
    assert loaded.case.name == "_b____"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "scan.nii.gz"]


# What is refused


def refused(receive, parts, limits=LIMITS) -> str:
    with pytest.raises(ValueError) as error:
        receive(parts, limits)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize(
    "name",
    ["../head_1.tif", "a/../../head_1.tif", "/etc/head_1.tif", "C:\\head_1.tif", "..\\h_1.tif"],
)
def test_a_path_out_of_the_archive(receive, name):
    message = refused(receive, {"images": named(**{"bad.zip": zipped({name: b"x"})})})
    assert message.startswith("bad.zip: ") and "leads out of it" in message


def test_a_link_in_an_archive(receive):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        link = zipfile.ZipInfo("head_1.tif")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    assert "leads out" in refused(receive, {"images": named(**{"bad.zip": buffer.getvalue()})})


def test_an_archive_that_unpacks_to_too_much(receive):
    bomb = zipped({"head_1.tif": bytes(30 * MIB)})
    assert len(bomb) < MIB
    message = refused(receive, {"images": named(**{"b.zip": bomb})}, Limits(unpacked=20 * MIB))
    assert message == "b.zip: more than 20 MiB unpacked; send one case"


def test_an_archive_that_lies_about_its_size(receive, tmp_path):
    bomb = bytearray(zipped({"head_1.tif": bytes(30 * MIB)}))
    size = (30 * MIB).to_bytes(4, "little")
    assert bomb.count(size) == 2  # in the member's header and in the directory
    lying = bytes(bomb).replace(size, (100).to_bytes(4, "little"))
    refused(receive, {"images": named(**{"b.zip": lying})}, Limits(unpacked=20 * MIB))
    assert sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()) < 22 * MIB


def test_too_many_files(receive):
    many = zipped({f"head_{k}.tif": b"" for k in range(20)})
    message = refused(receive, {"images": named(**{"b.zip": many})}, Limits(files=10))
    assert message == "b.zip: more than 10 files; send one case"


@pytest.mark.parametrize("kind", ["no zip", "cut short", "damaged", "encrypted", "empty", "nested"])
def test_archives_that_cannot_be_read(phantom, receive, kind):
    whole = zipped(slices_of(phantom))
    content = {
        "no zip": b"not an archive",
        "cut short": whole[: len(whole) // 2],
        "damaged": whole[:60] + bytes(200) + whole[260:],
        "encrypted": whole.replace(
            b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"
        ),
        "empty": zipped({}),
        "nested": zipped({"a.zip": whole}),
    }[kind]
    assert content != whole
    assert "bad" in refused(receive, {"images": named(**{"bad.zip": content})})


@pytest.mark.parametrize(
    "parts, says",
    [
        ({}, "no scan was sent"),
        ({"mask": {"m.nii": b"x"}}, "no scan was sent"),
        ({"pre": {"a.nii": b"x"}}, "flair is missing"),
        ({"flair": {"a.nii": b"x"}, "images": {"b.nii": b"x"}}, "send one or the other"),
        ({"flair": {"a.tif": b"x"}}, "flair: send one volume file"),
        ({"images": {"a.nii": b"x", "b.nii": b"x"}}, "holds a.nii and b.nii"),
        ({"images": {"a.doc": b"x"}}, "holds no slice"),
        ({"images": {"a.nii.gz": b""}}, "a.nii.gz: not a readable volume"),
        ({"images": {"h_1.tif": b"II*\0"}}, "h_1.tif: not a readable image"),
        ({"images": {"x" * 300 + ".nii": b""}}, "its name is too long"),
        ({"images": {"h_1.tif": b"x"}, "mask": {"m.nii": b"x"}}, "m.nii: is one volume file"),
        ({"images": {"h.nii": b"x"}, "mask": {"m_1.tif": b"x"}}, "m_1.tif: send the mask as one"),
        ({"images": {"a/h_1.tif": b"x", "b/h_1.tif": b"x"}}, "h_1.tif was sent twice"),
    ],
)  # fmt: skip
def test_uploads_that_make_no_case(receive, parts, says):
    assert says in refused(receive, {name: named(**files) for name, files in parts.items()})


MHA = "ObjectType = Image\nNDims = 3\nDimSize = 8 8 4\nElementType = MET_UCHAR\n"
NRRD = "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 8 8 4\nencoding: raw\n"


@pytest.mark.parametrize(
    "name, text",
    [
        ("a.mhd", MHA + "ElementDataFile = LOCAL\n"),
        ("a.nhdr", NRRD + "\n"),
        ("a.mha", MHA + "ElementDataFile = {}\n"),
        ("a.mha", MHA + "ElementDataFile={}\n"),
        ("a.mha", MHA + "ElementDataFile : {}\n"),
        ("a.mha", MHA + "ElementDataFile = LIST\n{}\n"),
        ("a.mha", MHA + "elementdatafile = LOCAL\nElementDataFile = {}\n"),
        ("a.mha", MHA + "XElementDataFile = LOCAL\nElementDataFile = {}\n"),
        ("a.mha", MHA + "Comment = ElementDataFile = LOCAL\nElementDataFile = {}\n"),
        ("a.mha", MHA + "Comment = x\rElementDataFile = {}\nElementDataFile = LOCAL\n"),
        ("a.mha", MHA + "ElementDataFile\0 = {}\nElementDataFile = LOCAL\n"),
        ("a.mha", MHA + "Comment = x\n" * 100_000 + "ElementDataFile = {}\n"),
        ("a.mha", MHA),
        ("a.nrrd", NRRD + "data file: {}\n\n"),
        ("a.nrrd", NRRD + "DataFile: {}\n\n"),
        ("a.nrrd", NRRD.replace("\n", "\r\n") + "data file: {}\r\n\r\n"),
        ("a.nrrd", NRRD.replace("\n", "\r") + "data file: {}\r\r"),
        ("a.nrrd", NRRD + "# x\rdata file: {}\n\n"),
        ("a.nrrd", NRRD + "# x\n" * 300_000 + "data file: {}\n\n"),
        ("a.nrrd", NRRD + "data file: {}"),
        ("a.nrrd", NRRD + "\tdata file: {}\n\n"),
    ],
)
def test_a_header_that_points_at_a_file_of_the_server(receive, tmp_path, name, text):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(256)) * 32)
    message = refused(receive, {"images": named(**{name: text.format(secret).encode()})})
    assert "keeps its voxels in" in message and "secret" not in message


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "a.nii", "h_1.png", "a.dcm"])
@pytest.mark.parametrize("place", [0, 512, 4096])
def test_a_file_of_a_format_that_links_to_others(receive, name, place):
    content = bytes(place) + unpacking.HDF5 + bytes(10_000)
    images = named(**{name: content}, **({"b.dcm": b"x"} if name == "a.dcm" else {}))
    assert "is an HDF5 file" in refused(receive, {"images": images})


def test_a_slice_number_far_away(phantom, receive):
    files = {"h_1.tif": tiff(phantom[0][0]), "h_999999999.tif": tiff(phantom[0][0])}
    assert "slice 2 is missing" in refused(receive, {"images": named(**files)})


@pytest.mark.parametrize(
    "shape, said",
    [
        ((1, 2, 2000), "2000 x 2 x 1 voxels are too many (at most 1024 along an axis"),
        ((2000, 8, 8), "8 x 8 x 2000 voxels are too many"),
        ((8, 100, 400), "400 x 100 x 8 voxels are too many"),
        ((4, 4, 4, 2, 2), "a.nii.gz: "),
        ((4, 8, 8, 7), "7 channels"),
    ],
)
def test_a_volume_of_odd_or_large_shape(receive, tmp_path, shape, said):
    voxels = np.zeros(shape, np.uint8).transpose(2, 1, 0, *range(3, len(shape)))
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii.gz")
    images = named(**{"a.nii.gz": (tmp_path / "a.nii.gz").read_bytes()})
    assert said in refused(receive, {"images": images}, Limits(voxels=150_000))


@pytest.mark.parametrize("member", [".", "./", "a//", "a/."])
def test_members_with_odd_names(receive, member):
    message = refused(receive, {"images": named(**{"bad.zip": zipped({member: b"x"})})})
    assert message.startswith("bad.zip: ") or "holds no slice" in message


def test_archives_with_other_compression_are_refused(phantom, receive):
    content = zipped(slices_of(phantom), zipfile.ZIP_LZMA)
    assert "in an unsupported way" in refused(receive, {"images": named(**{"bad.zip": content})})


# The process that reads


@pytest.fixture
def order(tmp_path):
    limits = {"seconds": 30, "memory": 1 << 32}
    return {"folder": str(tmp_path), "parts": {"images": [("a.nii", "")]}, "limits": limits}


def test_a_reader_that_takes_too_long_is_stopped(order, monkeypatch):
    monkeypatch.setattr(uploads, "work", lambda *_: time.sleep(60))
    order["limits"]["seconds"] = 0.3
    start = time.monotonic()
    assert attend(order) == {"error": "a.nii: reading it took more than 0 s; crop it"}
    assert time.monotonic() - start < 30, "stopped, not waited for"


def test_a_reader_that_crashes_gives_an_error(order, monkeypatch):
    monkeypatch.setattr(uploads, "work", lambda *_: os.kill(os.getpid(), 9))
    assert attend(order) == {"error": f"a.nii: {uploads.BROKEN}"}


def test_a_reader_that_died_is_started_again(phantom, receive, process):
    os.kill(process._process.pid, 9)
    process._process.wait()
    assert np.array_equal(receive({"images": named(**slices_of(phantom))}).volume, phantom[0])


def test_a_reader_that_dies_at_work_is_the_servers_fault(receive, process):
    process._process.send_signal(signal.SIGSTOP)
    threading.Timer(0.3, process._process.kill).start()
    with pytest.raises(Unavailable, match="could not be read now; try again later"):
        receive({"images": named(a=b"x")})


def test_a_closed_reader_reads_no_more(tmp_path, without_reader):
    closed = Reader(LIMITS)
    closed.close()
    with pytest.raises(Unavailable, match="is stopping"):
        closed.read({"images": named(a=b"x")}, tmp_path)


def full(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_not_called_a_damaged_upload(order, monkeypatch):
    sent = Path(order["folder"], "images-0.sent")
    sent.write_bytes(zipped({"a.nii": b"x"}))
    order["parts"]["images"] = [("a.zip", str(sent))]
    order["limits"] = asdict(Limits())
    monkeypatch.setattr(unpacking, "_write", full)
    assert attend(order) == {"error": "[Errno 28] No space left on device", "full": True}


def test_a_disk_that_is_full_when_the_volume_is_saved(order, phantom, monkeypatch):
    """Allow no file at all, the answer's included."""
    sent = Path(order["folder"], "images-0.sent")
    sent.write_bytes(zipped(slices_of(phantom)))
    order["parts"]["images"] = [("a.zip", str(sent))]
    order["limits"] = asdict(Limits())
    monkeypatch.setattr(uploads, "save_array", full)
    monkeypatch.setattr(Path, "write_text", full)
    assert attend(order)["full"]


SMALL = make_volume(0, slices=24, size=48)  # in place of the server's phantom, which takes long


@pytest.fixture(autouse=True)
def small_phantom(monkeypatch):
    monkeypatch.setattr("server.jobs.make_volume", lambda *_, **__: SMALL)


@pytest.fixture
def without_reader(monkeypatch):
    """Let the process that reads be one that starts at once, and answers nothing."""
    monkeypatch.setattr(Reader, "_start", start_idle)


def start_idle(_: Reader) -> subprocess.Popen:
    return subprocess.Popen(
        ["sh", "-c", "cat > /dev/null"],  # it ends with this process
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def post(service: Service, **sent) -> httpx.Response:
    """Send an upload to the app, in this process."""

    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(make_app(service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post("/api/segment", timeout=60, **sent)

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "where",
    [
        "tempfile.TemporaryFile",
        "server.jobs.shutil.copyfileobj",
        "server.jobs.Reader._ask",
        "server.answers.write_case",
    ],
)
@pytest.mark.parametrize(
    "number, says",
    [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full"), (errno.EMFILE, "many files")],
)
def test_what_the_server_lacks_is_its_fault(service, monkeypatch, caplog, where, number, says):
    sent = {"images": ("a.nii", bytes(2 * MIB))}
    if where.endswith("write_case"):
        sent = {"phantom": (None, "1")}
    monkeypatch.setattr(where, Mock(side_effect=OSError(number, "x")))
    response = post(service, files=sent)
    assert response.status_code == 503 and response.headers["retry-after"] == "60"
    assert says in response.json()["error"] and "try again later" in response.json()["error"]
    assert not caplog.records, "no traceback"


@pytest.mark.parametrize("valid", [True, False])
def test_a_dicom_upload_gets_a_segmentation(service, phantom, tmp_path, valid):
    import pydicom
    from test_scan import write_series

    pytest.importorskip("highdicom", reason="pip install -r requirements-dicom.txt")
    tags = {"FrameOfReferenceUID": "1.2.4"} if valid else {}
    folder = write_series(tmp_path / "series", phantom[0][..., 1], **tags)
    files = []
    for path in sorted(folder.iterdir()):
        files.append(("images", (f"series/{path.name}", path.read_bytes())))
    with zipfile.ZipFile(io.BytesIO(post(service, files=files).content)) as archive:
        summary = json.loads(archive.read("summary.json"))
        assert ("series_seg.dcm" in archive.namelist()) == valid
        if valid:
            written = pydicom.dcmread(io.BytesIO(archive.read("series_seg.dcm")))
            assert (
                written.Modality == "SEG"
                and int(written.pixel_array.sum()) == summary["lesion_voxels"]
            )
        else:
            assert "no DICOM Segmentation: " in str(summary["notes"])
            assert str(tmp_path) not in str(summary) and "--" not in str(summary)


def test_refused_uploads_leave_no_file_open(service, monkeypatch):
    opened, temporary = [], tempfile.SpooledTemporaryFile

    def spy(*args, **options):
        opened.append(temporary(*args, **options))
        return opened[-1]

    monkeypatch.setattr("starlette.formparsers.SpooledTemporaryFile", spy)
    for field in ("picture", "mask", "images"):
        response = post(service, files={field: ("a.nii", bytes(2 * MIB))})
        assert response.status_code == 400
    assert len(opened) == 3 and all(file.closed for file in opened)


def test_an_upload_after_the_end_is_told_so(without_reader):
    service = make_service()
    service.close()
    response = post(service, files={"phantom": (None, "1")})
    assert response.status_code == 503 and "is stopping" in response.json()["error"]
    assert service.pending == []


def test_a_network_at_work_does_not_delay_the_end(tmp_path, monkeypatch, without_reader):
    service = make_service()
    begun, go_on, ended = threading.Event(), threading.Event(), []
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(os, "_exit", ended.append)
    network = service.segmenter._network

    def wait(batch):
        begun.set()
        go_on.wait(20)
        return network(batch)

    monkeypatch.setattr(service.segmenter, "_network", wait)
    job = service.submit(None)
    begun.wait()
    start = time.monotonic()
    service.close()
    service.end()
    assert time.monotonic() - start < 10
    assert ended == [1] and not any(tmp_path.iterdir())
    go_on.set()
    with pytest.raises(Unavailable):
        job.future.result()


def test_a_waiting_upload_is_told_that_the_server_stops():
    job, service = Job(), SimpleNamespace(ahead=lambda _: 1)
    job.future = Future()
    job.future.cancel()  # as Service.close does

    async def told() -> list[str]:
        return [line async for line in lines(service, job)]

    assert asyncio.run(told())[-1] == '{"error": "the server is stopping; try again later"}'


def test_an_abandoned_job_is_stopped(monkeypatch, without_reader):
    service, begun, left = make_service(batch_size=1), threading.Event(), threading.Event()
    network = service.segmenter._network

    def wait(batch):
        begun.set()
        left.wait()
        return network(batch)

    monkeypatch.setattr(service.segmenter, "_network", wait)
    job = service.submit(None)
    begun.wait()
    job.abandoned = True
    left.set()
    with pytest.raises(CancelledError):
        job.future.result()
    assert 0 < job.done < 1
    service.close()


def test_an_abandoned_upload_is_read_no_further(service, monkeypatch):
    service.reader._kill()
    service.reader._process = start_idle(service.reader)
    job = service.submit({"images": named(**{"a.nii": b"x"})})
    while service.reader.job is None:
        time.sleep(0.01)
    service.abandon(job)
    with pytest.raises(Unavailable):
        job.future.result(20)
    with pytest.raises(ValueError, match="not a readable volume"):
        service.submit({"images": named(**{"a.nii": b"x"})}).future.result(60)


def test_a_reader_has_bounded_memory(receive):
    """Send a TIFF of 1.6 MB that unpacks to 1.1 GB."""
    buffer, side = io.BytesIO(), 33_000
    with tifffile.TiffWriter(buffer) as writer:
        tile = zlib.compress(bytes(8192 * 8192), level=1)  # compressed once: all tiles are the same
        options = {"tile": (8192, 8192), "compression": "zlib"}
        writer.write(iter([tile] * 25), shape=(side, side), dtype=np.uint8, **options)
    limits = Limits(memory=1024 * MIB)
    message = refused(receive, {"images": named(**{"h_1.tif": buffer.getvalue()})}, limits)
    assert "needs more than 1024 MiB" in message
