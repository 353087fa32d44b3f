"""Test the server as its users see it: HTTP API and limits; the page is in test_page."""

import ast
import asyncio
import contextlib
import csv
import errno
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest.mock import Mock

import nibabel
import numpy as np
import pytest
import torch
from conftest import ROOT, TRAINED_ON, make_weights
from test_files import leave_scratch
from test_upload import start_idle

import inference
from brainseg.metrics import dsc
from brainseg.phantom import make_volume, write_data_set

for module in ("starlette", "uvicorn", "python_multipart"):
    pytest.importorskip(module, reason="pip install -r requirements-app.txt")
httpx = pytest.importorskip("httpx")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return a scan with its mask, the same as zipped slices, weights, and inference.py's masks."""
    import SimpleITK

    folder = tmp_path_factory.mktemp("files")
    volume, mask = make_volume(0, slices=8, size=64)
    for name, array in (("head", volume), ("head_mask", mask.astype(np.uint8))):
        image = SimpleITK.GetImageFromArray(array, isVector=array.ndim == 4)
        image.SetSpacing((1.5, 1.5, 4.0))
        SimpleITK.WriteImage(image, str(folder / f"{name}.nii.gz"))
    write_data_set(folder / "slices", cases=1, slices=8, size=64)
    shutil.make_archive(str(folder / "slices"), "zip", folder / "slices")
    weights = make_weights(folder / "unet.pt")
    for images in ("head.nii.gz", "slices"):
        inference.main(
            ["--images", str(folder / images), "--weights", str(weights)]
            + ["--predictions", str(folder / "expected"), "--figure", str(folder / "dsc.png")]
        )
    return folder


def start(
    folder: Path, weights: Path, *options: str, files: int | None = None
) -> tuple[subprocess.Popen, str]:
    """Start the server in a separate process, which may open so many `files`.

    Returns the process and its address.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "app.py"), "--port", str(port), "--weights", str(weights)]
    if files:
        command = ["sh", "-c", f'ulimit -n {files}; exec "$@"', "sh", *command]
    with open(folder / "server.log", "wb") as log:
        process = subprocess.Popen(
            [*command, *options], stdout=log, stderr=log, env=os.environ | {"TMPDIR": str(folder)}
        )
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        assert process.poll() is None, (folder / "server.log").read_text()
        try:
            httpx.get(f"{url}/api")
            return process, url
        except httpx.TransportError:
            time.sleep(0.2)
    raise AssertionError("the server did not start")


def test_a_port_that_is_taken_is_one_sentence(files, tmp_path, monkeypatch):
    import app

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("server.jobs.Reader._start", start_idle)
    leave_scratch(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as stop:
        port = str(taken.getsockname()[1])
        app.main(["--port", port, "--weights", str(files / "unet.pt")])
    assert stop.value.code == (
        f"error: 127.0.0.1:{port}: address already in use; change --host or --port"
    )
    assert not any(tmp_path.iterdir()), "what a killed server left is gone"


def test_the_api_answers_in_json_whatever_the_method(server):
    for method, sent in (("GET", None), ("PUT", bytes(3 * 2**20))):
        answer = httpx.request(method, f"{server[0]}/api/segment", content=sent)
        assert answer.status_code == 405 and "by POST" in answer.json()["error"]


def stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=30)


@pytest.fixture(scope="module")
def server(files, tmp_path_factory):
    """Return the address of a server and the folder of its temporary files."""
    folder = tmp_path_factory.mktemp("server")
    process, url = start(folder, files / "unet.pt", "--max-upload", "8", "--queue", "60")
    yield url, folder
    stop(process)
    assert [path.name for path in folder.iterdir()] == ["server.log"], "all is gone"
    log = (folder / "server.log").read_text()
    assert "Traceback" not in log and "never retrieved" not in log, log


def post(url: str, **sent) -> httpx.Response:
    return httpx.post(f"{url}/api/segment", timeout=120, **sent)


def unpacked(response: httpx.Response) -> dict[str, bytes]:
    assert response.status_code == 200, response.text
    with zipfile.ZipFile(io.BytesIO(response.content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


# The API


def test_a_scan_gets_the_mask_of_inference_to_the_byte(server, files):
    sent = {
        "images": open(files / "head.nii.gz", "rb"),
        "mask": open(files / "head_mask.nii.gz", "rb"),
    }
    answer = unpacked(post(server[0], files=sent))
    assert sorted(answer) == [
        "head.gif", "head_mask.nii.gz", "head_probability.nii.gz", "montage.png", "summary.csv",
        "summary.json",
    ]  # fmt: skip
    assert answer["head_mask.nii.gz"] == (files / "expected/head_mask.nii.gz").read_bytes()
    summary = json.loads(answer["summary.json"])
    assert summary["case"] == "head" and summary["shape"] == [8, 64, 64]
    assert summary["lesion_ml"] == pytest.approx(summary["lesion_voxels"] * 9 / 1000)
    assert 0 < summary["scores"]["dsc"] <= 1 and "hd95_mm" in summary["scores"]
    assert summary["expected_dsc"] is None, "these weights have no fit"
    assert summary["no_expected_dsc"] == "this network has no fit; evaluate.py makes one"
    (row,) = csv.DictReader(io.StringIO(answer["summary.csv"].decode()))
    assert float(row["dsc"]) == pytest.approx(summary["scores"]["dsc"])
    probability = nibabel.Nifti1Image.from_bytes(gzip.decompress(answer["head_probability.nii.gz"]))
    mask = nibabel.Nifti1Image.from_bytes(gzip.decompress(answer["head_mask.nii.gz"]))
    assert np.array_equal(probability.affine, mask.affine)
    assert np.asarray(probability.dataobj)[np.asarray(mask.dataobj) > 0].min() >= 0.499


def test_slices_in_an_archive_too(server, files):
    answer = unpacked(post(server[0], files={"images": open(files / "slices.zip", "rb")}))
    names = [f"phantom_000_{k}_mask.tif" for k in range(1, 9)]
    assert set(names) < answer.keys()
    for name in names:
        assert answer[name] == (files / "expected/phantom_000" / name).read_bytes()
    assert json.loads(answer["summary.json"])["lesion_ml"] is None, "slices know no spacing"


def test_several_files_and_a_phantom(server, files):
    slices = sorted((files / "slices/phantom_000").iterdir())
    several = unpacked(post(server[0], files=[("images", open(path, "rb")) for path in slices]))
    assert "phantom_000_1_mask.tif" in several
    answer = unpacked(post(server[0], files={"phantom": (None, "1")}))
    assert json.loads(answer["summary.json"])["shape"] == [24, 192, 192]


def test_register_moves_a_sequence_to_flair(server, tmp_path):
    import SimpleITK

    volume, sent = make_volume(3, slices=24, size=64)[0], {}
    for name, sequence in (("flair", volume[..., 1]), ("post", np.roll(volume[..., 2], 3, axis=2))):
        image = SimpleITK.GetImageFromArray(sequence)
        image.SetSpacing((3, 3, 6))
        SimpleITK.WriteImage(image, str(tmp_path / f"{name}.nii.gz"))
        sent[name] = (f"{name}.nii.gz", (tmp_path / f"{name}.nii.gz").read_bytes())
    answers = [post(server[0], files=sent), post(server[0], files=sent | {"register": (None, "1")})]
    left, moved = (json.loads(unpacked(answer)["summary.json"])["notes"] for answer in answers)
    (distance,) = re.findall(
        r"post-contrast was registered to FLAIR: moved by ([\d.]+) mm", str(moved)
    )
    assert float(distance) == pytest.approx(3 * 3, abs=1) and "registered" not in str(left)


def test_the_example_of_the_documentation(server, files, tmp_path, monkeypatch):
    (example,) = re.findall(
        r"<!-- run by tests/test_app.py -->\n```python\n(.*?)```",
        (ROOT / "docs/server.md").read_text(),
        re.S,
    )
    shutil.copy(files / "head.nii.gz", tmp_path / "scan.nii.gz")
    monkeypatch.chdir(tmp_path)
    exec(example.replace("http://127.0.0.1:7860", server[0]), {})
    assert (tmp_path / "result/scan_mask.nii.gz").read_bytes() == (
        files / "expected/head_mask.nii.gz"
    ).read_bytes()


@pytest.mark.parametrize(
    "sent, says",
    [
        ({"files": {"images": ("a.nii.gz", b"rubbish")}}, "a.nii.gz: not a readable volume"),
        ({"files": {"images": ("a.doc", b"rubbish")}}, "holds no scan; choose a volume file"),
        ({"files": {"picture": ("a.nii", b"rubbish")}}, "'picture' is not a field"),
        ({"files": {"images": (None, "text")}}, "images: is not a file"),
        ({}, "send multipart/form-data"),
        (
            {"files": {"phantom": (None, "1"), "images": ("a.nii", b"x")}},
            "'phantom' is not a field",
        ),
        (
            {"content": b"rubbish", "headers": {"Content-Type": "multipart/form-data; boundary=x"}},
            "multipart",
        ),
    ],
)
def test_a_bad_upload_gets_one_sentence(server, sent, says):
    response = post(server[0], **sent)
    assert response.status_code == 400
    error = response.json()["error"]
    assert says in error and "\n" not in error
    assert str(server[1]) not in response.text and "received" not in response.text


def test_blank_and_constant_volumes(server, tmp_path):
    import SimpleITK

    found = {}
    for value in (0, 7):
        image = SimpleITK.GetImageFromArray(np.full((4, 32, 32), value, np.uint8))
        SimpleITK.WriteImage(image, str(tmp_path / "a.nii.gz"))
        found[value] = post(server[0], files={"images": open(tmp_path / "a.nii.gz", "rb")})
    assert json.loads(unpacked(found[0])["summary.json"])["slices_touched"] == []
    assert found[7].status_code == 400
    assert found[7].json()["error"] == "a: every voxel is 7: this is not an image"


def test_an_upload_that_is_too_large_is_refused(server):
    message = {"error": "larger than 8 MiB; crop the scan, or compress it"}
    large = bytes(10 * 2**20)
    response = post(server[0], files={"images": ("a.nii", large)})
    assert (response.status_code, response.json()) == (413, message)
    assert "content-security-policy" in response.headers


def test_eight_clients_at_once_all_get_their_answer(server, files):
    content = (files / "head.nii.gz").read_bytes()
    expected = (files / "expected/head_mask.nii.gz").read_bytes()

    def ask(k: int) -> bool:
        answer = unpacked(post(server[0], files={"images": (f"head{k}.nii.gz", content)}))
        return answer[f"head{k}_mask.nii.gz"] == expected

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(8)))


def test_nothing_is_kept(server, files):
    url, folder = server
    unpacked(post(url, files={"images": open(files / "head.nii.gz", "rb")}))
    post(url, files={"images": ("a.nii.gz", b"rubbish")})
    left = [path for path in folder.rglob("*") if path.is_file() and path.name != "server.log"]
    assert left == []


def test_the_page_serves_no_file_of_the_machine(server):
    for path in (
        "../README.md",
        "%2e%2e/README.md",
        "//etc/passwd",
        "..%5cREADME.md",
        "web/../app.py",
    ):
        assert httpx.get(f"{server[0]}/{path}").status_code in (400, 404)


def test_progress_and_result_as_lines(server, files):
    sent = {"images": open(files / "head.nii.gz", "rb")}
    response = post(server[0], files=sent, headers={"Accept": "application/x-ndjson"})
    *waiting, last = map(json.loads, response.text.splitlines())
    assert waiting and all("waiting" in line for line in waiting)
    assert last["viewer"]["numbers"] == [*range(1, 9)] and last["summary"]["case"] == "head"
    sent = {"images": ("a.nii", b"rubbish")}
    response = post(server[0], files=sent, headers={"Accept": "application/x-ndjson"})
    assert "a.nii: not a readable" in json.loads(response.text.splitlines()[-1])["error"]


def test_health(server, files):
    answer = httpx.get(f"{server[0]}/api/health")
    state = answer.json()
    assert answer.status_code == 200 and state["ready"]
    assert state["queue"] == {"uploads": 0, "places": 60}
    assert state["weights"] == {
        "unet.pt": hashlib.sha256((files / "unet.pt").read_bytes()).hexdigest()
    }
    schema = httpx.get(f"{server[0]}/api/openapi.json").json()["components"]["schemas"]["Health"]
    assert state.keys() == schema["properties"].keys()


def references(part: object) -> Iterator[str]:
    """Yield every $ref in a description."""
    if isinstance(part, dict):
        if "$ref" in part:
            yield part["$ref"]
        part = list(part.values())
    if isinstance(part, list):
        for each in part:
            yield from references(each)


def test_the_openapi_description(server, files):
    """Check the parts that generators of API clients read, without openapi-spec-validator."""
    described = httpx.get(f"{server[0]}/api/openapi.json").json()
    assert described["openapi"] == "3.1.0" and {"title", "version"} <= described["info"].keys()
    for reference in references(described):
        place = described
        assert reference.startswith("#/")
        for key in reference[2:].split("/"):
            place = place[key]
    names = set()
    for path, item in described["paths"].items():
        assert path.startswith("/api/")
        for method, operation in item.items():
            names.add(operation["operationId"])
            statuses = operation["responses"]
            answers = described["components"]["responses"]
            for status, response in statuses.items():
                if "$ref" in response:
                    response = answers[response["$ref"].rpartition("/")[2]]
                assert response["description"]
                assert ("headers" in response) == (status in ("429", "503")), "Retry-After"
            answer = httpx.request("GET" if method == "get" else "POST", f"{server[0]}{path}")
            assert str(answer.status_code) in statuses
    assert names == {"segment", "health"}
    fields = described["components"]["schemas"]["Upload"]["properties"]
    told = httpx.get(f"{server[0]}/api").text
    for field in fields:
        assert f"\n  {field}" in told, "api.txt lists it too"
    response = post(server[0], files={field: (None, "x") for field in [*fields, "other"]})
    assert "'other'" in response.text or "is not a file" in response.text
    sent = {"images": open(files / "head.nii.gz", "rb")}
    summary = json.loads(unpacked(post(server[0], files=sent))["summary.json"])
    assert described["components"]["schemas"]["Summary"]["properties"].keys() < summary.keys()


def test_no_message_names_an_option():
    """Look at every sentence of the rooms that an upload passes through."""
    from server.wording import in_page_words

    option = re.compile(r"(?<![\w-])--[a-z]")
    told = 0
    rooms = [
        *ROOT.glob("brainseg/io/*.py"),
        ROOT / "brainseg/quality.py",
        ROOT / "brainseg/visits.py",
    ]
    for path in [*rooms, *ROOT.glob("server/*.py")]:
        if path.name == "wording.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            text = ""
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
            elif isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else "x" for part in node.values
                ]
                text = "".join(map(str, parts))
            if option.search(text) and "\n" not in text:
                told += 1
                assert not option.search(in_page_words(text)), text
    assert told > 20


def test_channels_in_the_words_of_the_page():
    from server.wording import in_page_words

    said = in_page_words("4 channel(s); give FLAIR in place of one (--channels picks those)")
    assert said == "4 channel(s); give FLAIR in place of one"


@pytest.mark.parametrize(
    "names, used",
    [
        (("pre", "flair", "post"), "pre-contrast, FLAIR, post-contrast"),
        (("a_pre", "a_flair", "a_post"), "FLAIR"),
        (("a_t1", "a_t2", "a_post"), ""),
    ],
)
def test_sequences_sent_as_files_make_one_case(server, files, tmp_path, names, used):
    import SimpleITK

    head, sent = SimpleITK.ReadImage(str(files / "head.nii.gz")), []
    for k, name in enumerate(names):
        path = tmp_path / f"{name}.nii.gz"
        SimpleITK.WriteImage(SimpleITK.VectorIndexSelectionCast(head, k), str(path))
        sent.append(("images", (path.name, path.read_bytes())))
    response = post(server[0], files=sent)
    if not used:
        assert response.status_code == 400
        assert 'under "One file per sequence"' in response.json()["error"]
        return
    summary = json.loads(unpacked(response)["summary.json"])
    assert summary["sequences"] == used
    left_out = "not used, as their names do not say what they are: a_post.nii.gz, a_pre.nii.gz"
    assert (left_out in str(summary["notes"])) == (used == "FLAIR")


def test_a_training_patient_is_marked(server, files, tmp_path):
    name = f"{TRAINED_ON[0]}.nii.gz"
    shutil.copy(files / "head.nii.gz", tmp_path / name)
    for path, marked in ((tmp_path / name, True), (files / "head.nii.gz", False)):
        answer = unpacked(post(server[0], files={"images": open(path, "rb")}))
        assert json.loads(answer["summary.json"])["trained_on"] == marked


def test_a_client_that_leaves_frees_its_place(server):
    with httpx.stream(
        "POST",
        f"{server[0]}/api/segment",
        files={"phantom": (None, "1")},
        headers={"Accept": "application/x-ndjson"},
        timeout=60,
    ) as response:
        next(response.iter_lines())
    for _ in range(100):
        if httpx.get(f"{server[0]}/api/health").json()["queue"]["uploads"] == 0:
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the place is not free")


def test_another_host_name_is_refused(server):
    response = httpx.get(f"{server[0]}/", headers={"Host": "elsewhere.example"})
    assert response.status_code == 400


# Limits


@pytest.fixture(scope="module")
def service(files):
    """Return what segments in this process; its phantom is small, and it reads no upload."""
    from brainseg.segmenter import Segmenter
    from server import jobs
    from server.unpacking import Limits

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs, "make_volume", lambda seed, slices, size: make_volume(seed, slices, 48))
        patch.setattr(jobs.Reader, "_start", start_idle)
        service = jobs.Service(Segmenter.from_weights(files / "unet.pt"), Limits())
        yield service
        service.close()


def test_the_lesion_of_the_head_to_try_is_found():
    """Once, the mask was of the fat behind its eyes, with a DSC of 0."""
    from brainseg.segmenter import Segmenter
    from brainseg.weights import shipped_weights
    from server.jobs import PHANTOM

    volume, truth = make_volume(PHANTOM, slices=24, size=192)
    mask = Segmenter.from_weights(shipped_weights("unet"), device="cpu")(volume)
    assert dsc(mask, truth) > 0.85


def test_a_full_queue_says_so(service, monkeypatch):
    from server.api import make_app

    go_on, probabilities = threading.Event(), service.segmenter.probabilities
    monkeypatch.setattr(
        service.segmenter, "probabilities", lambda *given: go_on.wait(60) and probabilities(*given)
    )

    async def ask() -> list[httpx.Response]:
        app = make_app(service, queue=2)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://localhost", timeout=60
        ) as client:

            def post():
                return client.post("/api/segment", files={"phantom": (None, "1")})

            waiting = [asyncio.create_task(post()) for _ in range(2)]
            while len(service.pending) < 2:
                await asyncio.sleep(0.01)
            refused = await post()
            go_on.set()
            return [refused, *await asyncio.gather(*waiting), await post()]

    full, *others = asyncio.run(ask())
    assert full.status_code == 503
    assert full.json()["error"] == "2 uploads are already waiting; try again in a minute"
    assert full.headers["retry-after"] == "60"
    assert [each.status_code for each in others] == [200] * 3, "places come back"


def test_segmenting_respects_its_time_limit(service, monkeypatch):
    from server.unpacking import Limits

    monkeypatch.setattr(service, "limits", Limits(seconds=1e-6))
    monkeypatch.setattr(service.segmenter, "batch_size", 1)
    with pytest.raises(ValueError, match="segmenting it took more than 0 s"):
        service.submit(None).future.result()


@pytest.mark.parametrize(
    "fault",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
    ids=["numpy", "GPU", "processor"],
)
def test_too_little_memory_is_one_sentence(service, monkeypatch, fault):
    with monkeypatch.context() as patch:
        patch.setattr(service.segmenter, "probabilities", Mock(side_effect=fault))
        with pytest.raises(ValueError, match="more memory than the server has; crop it"):
            service.submit(None).future.result()
    assert service.submit(None).future.result().files, "the next is segmented"


@pytest.fixture(scope="module")
def small_server(files, tmp_path_factory):
    """Start a server with two places that may open 128 files; return process, address, folder."""
    folder = tmp_path_factory.mktemp("small")
    options = "--queue", "2", "--max-upload", "1"
    process, url = start(folder, files / "unet.pt", *options, files=128)
    yield process, url, folder
    stop(process)
    log = (folder / "server.log").read_text()
    assert "Traceback" not in log and len(log) < 1000, log


def test_failed_uploads_free_their_places_in_the_queue(files, small_server):
    """Aborted, too large and broken uploads outnumber the places."""
    url = small_server[1]
    host, port = url.removeprefix("http://").split(":")
    head = (
        f"POST /api/segment HTTP/1.1\r\nHost: {host}\r\n"
        "Content-Type: multipart/form-data; boundary=x\r\n"
    ).encode()
    for k in range(6):
        with socket.create_connection((host, int(port))) as client:
            if k % 2:  # the client leaves halfway through
                client.sendall(head + b"Content-Length: 1000\r\n\r\n--x\r\n")
                time.sleep(0.2)
            else:  # too much, in chunks without a total length
                chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
                client.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
                with contextlib.suppress(OSError):
                    for _ in range(40):
                        client.sendall(chunk)
    post(url, files={"images": ("a.nii", b"rubbish")})
    unpacked(post(url, files={"images": open(files / "head.nii.gz", "rb")}))


def test_idle_connections_make_room(files, small_server):
    url = small_server[1]
    host, port = url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        for _ in range(140):
            stack.enter_context(socket.create_connection((host, int(port))))
        for _ in range(3):
            assert httpx.get(url, timeout=20).status_code == 200
        unpacked(post(url, files={"images": open(files / "head.nii.gz", "rb")}))


def test_too_many_open_files_are_logged_once(caplog):
    from server.connections import report

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        for _ in range(9):
            report(loop, {"message": "x", "exception": OSError(errno.EMFILE, "x")})
        report(loop, {"message": "another"})
    first, second = caplog.messages
    assert "raise `ulimit -n`" in first and second == "another"


@pytest.fixture
def hasty(monkeypatch):
    """Return the port of a server in this process that waits for a client half a second."""
    import uvicorn

    from server import connections

    monkeypatch.setattr(connections, "PATIENCE", 0.5)

    async def large(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})
        for _ in range(1000):
            await send({"type": "http.response.body", "body": bytes(2**16), "more_body": True})
        await send({"type": "http.response.body"})

    config = uvicorn.Config(
        large, http=connections.Connection, lifespan="off", log_level="error", limit_concurrency=99
    )
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()
    assert not server.server_state.connections and not server.server_state.tasks


@pytest.mark.parametrize(
    "sent, answered",
    [
        (b"", False),
        (b"GET / HT", False),
        (b"GET / HTTP/1.1\r\nHost: a\r\n", False),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", True),
        (b"GET / HTTP/1.1\r\nHost: a\r\n\r\nGET / HT", True),
    ],
    ids=["nothing", "half a line", "half a head", "a request", "a second half"],
)
def test_a_client_that_sends_no_request_is_left(hasty, sent, answered):
    with socket.create_connection(("127.0.0.1", hasty), timeout=20) as client:
        client.sendall(sent)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(2**20):
                received += len(part)
        assert (received > 1000 * 2**16) == answered


def test_a_client_that_takes_no_answer_is_left(hasty):
    with socket.create_connection(("127.0.0.1", hasty), timeout=20) as client:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(2)
        received = 0
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(2**20):
                received += len(part)
        assert received < 1000 * 2**16


def test_server_stops_and_leaves_nothing_while_clients_wait(small_server):
    """No other test of this server may come after it."""
    process, url, folder = small_server
    answered = []

    def ask(_: int) -> None:
        with contextlib.suppress(httpx.TransportError):
            if post(url, files={"phantom": (None, "1")}).status_code == 200:
                answered.append(True)

    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, k) for k in range(2)]
        end = time.monotonic() + 60
        while not answered and time.monotonic() < end:
            time.sleep(0.01)
        still_waiting = 2 - len(answered)
        stop(process)
        for each in waiting:
            each.result()
    assert still_waiting == 1
    assert [path.name for path in folder.iterdir()] == ["server.log"]


async def echo(scope, receive, send):
    """Read the whole request and answer with an extra header."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-frame", b"1")]})
    await send({"type": "http.response.body", "body": b"ok"})


def guarded(method: str, **options) -> httpx.Response:
    from server.security import Guard

    async def ask() -> httpx.Response:
        app = Guard(echo, most=2**20, auth=options.pop("wanted", None))
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://server"
        ) as client:
            return await client.request(method, "/", **options)

    return asyncio.run(ask())


def test_the_password():
    assert guarded("GET").status_code == 200
    assert guarded("GET", wanted="me:secret", auth=("me", "secret")).status_code == 200
    for wrong in (None, ("me", "Secret"), ("you", "secret"), ("me", "")):
        response = guarded("GET", wanted="me:secret", auth=wrong)
        assert response.status_code == 401 and "Basic" in response.headers["www-authenticate"]


def test_wrong_passwords_make_their_client_wait(monkeypatch):
    from server import security

    guard, now = security.Guard(echo, most=2**20, auth="me:secret"), [1000.0]
    monkeypatch.setattr(security.time, "monotonic", lambda: now[0])

    def ask(password: str, address: str = "192.0.2.1") -> httpx.Response:
        async def get() -> httpx.Response:
            transport = httpx.ASGITransport(guard, client=(address, 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
                return await client.get("/", auth=("me", password))

        return asyncio.run(get())

    statuses = [ask(f"wrong {k}").status_code for k in range(60)]
    assert statuses == [401] * 5 + [429] * 55
    refused = ask("secret")
    assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
    assert refused.json()["error"] == "too many wrong passwords; try again in 1 s"
    assert ask("secret", "192.0.2.2").status_code == 200, "from elsewhere"
    for wait in (1, 2, 4, 8, 16, 32, 64, 64):
        now[0] += wait
        assert ask("wrong").status_code == 401 and ask("wrong").status_code == 429
    now[0] += 64
    assert ask("secret").status_code == 200
    assert ask("wrong").status_code == 401, "and all is forgotten"

    addresses = [f"2001:db8::{k:x}" for k in range(8)]  # of one network
    assert [ask("wrong", each).status_code for each in addresses] == [401] * 5 + [429] * 3
    for k in range(security.MOST_CLIENTS + 9):
        guard.attempts.add(f"client {k}")
    assert len(guard.attempts.wrong) == security.MOST_CLIENTS


def test_a_page_of_another_host_can_send_nothing():
    for site, status in (
        ("cross-site", 403),
        ("same-site", 403),
        ("same-origin", 200),
        ("none", 200),
    ):
        assert guarded("POST", headers={"Sec-Fetch-Site": site}).status_code == status


def test_size_is_counted_without_a_content_length():
    async def chunks():
        for _ in range(40):
            yield bytes(2**16)

    assert guarded("POST", content=chunks()).status_code == 413
    assert guarded("POST", content=bytes(2**20)).status_code == 200
    assert guarded("POST", content=bytes(2**20 + 1)).status_code == 413
    assert guarded("POST", content=b"", headers={"Content-Length": "-1"}).status_code == 413


def test_a_page_may_load_nothing_from_outside():
    headers = guarded("GET").headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert headers["x-frame"] == "1", "what the application says stays"


@pytest.mark.parametrize(
    "options, says",
    [
        (["--auth", "nobody"], "--auth must be user:password"),
        (["--queue", "0"], "--queue: must be at least 1"),
        (["--time-limit", "nan"], "--time-limit: must be at least 1"),
        (["--port", "70000"], "--port: must be less than 65536"),
        (["--weights", "none.pt"], "none.pt: no such file"),
    ],
)
def test_bad_options(options, says, capsys):
    import app

    with pytest.raises(SystemExit) as ending:
        app.main(options)
    assert ending.value.code != 0
    assert says in f"{ending.value.code}" + capsys.readouterr().err
