"""Test networks without their code: files of export.py, and ONNX Runtime in the Segmenter."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TRAINED_ON, make_weights
from test_inference import infer, refused, table
from torch import nn

import evaluate
import export
from brainseg import exporting, resnext_unet
from brainseg.io.files import RUN
from brainseg.onnx import PROVIDERS, OnnxNetwork, card_of, pick_providers
from brainseg.optional import import_optional
from brainseg.phantom import make_volume
from brainseg.resnext_unet import ResNeXtUNet
from brainseg.segmenter import Segmenter
from brainseg.unet import UNet
from brainseg.weights import file_hash, load_state, model_from_state

MISSING = [p for p in ("onnxruntime", "onnxscript") if importlib.util.find_spec(p) is None]
needs_onnx = pytest.mark.skipif(
    bool(MISSING), reason=f"{', '.join(MISSING)} missing: pip install -r requirements-onnx.txt"
)


@pytest.fixture(scope="module", autouse=True)
def small_phantom():
    """Compare an export with its network on a small phantom: the usual one takes long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporting, "make_volume", lambda seed: make_volume(seed, 4, 48))
        yield


def run_export(weights: Path, out: Path, *options: object) -> None:
    export.main([str(word) for word in ("--weights", weights, "--out", out, *options)])


@pytest.fixture(scope="module")
def onnx(weights) -> Path:
    if MISSING:
        pytest.skip(f"{', '.join(MISSING)} missing: pip install -r requirements-onnx.txt")
    run_export(weights, weights.parent, "--format", "onnx")
    (path,) = weights.parent.glob("narrow-*.onnx")
    assert path.stem == f"narrow-{file_hash(path)[:8]}"
    return path


@pytest.fixture(scope="module")
def volume() -> np.ndarray:
    return make_volume(5, slices=6, size=60)[0]


def segmenter(path: Path, **options) -> Segmenter:
    return Segmenter.from_weights(path, **{"device": "cpu", "amp": False, **options})


# The same network


@pytest.mark.parametrize(
    "options",
    [{}, {"tta": True}, {"image_size": 64, "batch_size": 1}, {"batch_size": 4}],
    ids=str,
)
def test_probabilities_are_those_of_pytorch(onnx, weights, volume, options):
    there, here = (segmenter(path, **options) for path in (onnx, weights))
    images, _ = here.preprocess(volume)
    expected = here.probabilities(images)
    assert expected.max() - expected.min() > 0.5, "so that equality means something"
    torch.testing.assert_close(there.probabilities(images), expected, atol=1e-5, rtol=0)


def test_masks_are_those_of_pytorch(onnx, weights, volume):
    mask = segmenter(onnx)(volume)
    assert mask.any() and mask.dtype == bool
    assert np.array_equal(mask, segmenter(weights)(volume))


@pytest.mark.parametrize("shape", [(1, 3, 16, 16), (3, 3, 32, 48), (5, 3, 96, 16)])
def test_number_height_and_width_are_free(onnx, weights, shape):
    x = torch.randn(shape)
    with torch.inference_mode():
        expected = model_from_state(load_state(weights), weights)[1](x)
    torch.testing.assert_close(OnnxNetwork(onnx, ["cpu"])(x), expected, atol=1e-5, rtol=0)


def test_slices_of_any_layout_and_type(onnx):
    network, x = OnnxNetwork(onnx, ["cpu"]), torch.randn(2, 3, 32, 16)
    expected = network(x)
    last = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network(last), expected, atol=0, rtol=0)
    torch.testing.assert_close(network(x.double()), expected, atol=0, rtol=0)


@pytest.mark.parametrize("shape", [(1, 2, 32, 32), (3, 32, 32), (1, 3, 32, 40)])
def test_other_shapes_are_refused_as_by_the_network_itself(onnx, shape):
    with pytest.raises(ValueError, match="the network takes|not a multiple of 16"):
        OnnxNetwork(onnx, ["cpu"])(torch.zeros(shape))


@needs_onnx
def test_an_ensemble_with_neighbours_in_half_precision(tmp_path, volume):
    files = []
    for k in range(2):
        torch.manual_seed(k)
        path = tmp_path / f"fold{k}.pt"
        torch.save(UNet(9, init_features=8).state_dict(), path)
        card = {"image_size": 32, "neighbours": 1, "cases": {"train": [f"phantom_00{k}"]}}
        path.with_suffix(".json").write_text(json.dumps(card))
        files.append(path)
    words = ["--weights", *files, "--out", tmp_path, "--format", "onnx", "--precision", "float16"]
    export.main([*map(str, words)])
    (file,) = tmp_path.glob("ensemble-float16-*.onnx")
    assert file.stat().st_size < 0.6 * sum(path.stat().st_size for path in files)
    there, here = segmenter(file), segmenter(files)
    images, frame = here.preprocess(volume)
    assert there.neighbours == 1 and images.shape[1] == 3
    rough, exact = there.probabilities(images), here.probabilities(images)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, atol=0.01, rtol=0)
    assert there.segmentation_of(rough, frame).features["disagreement"] > 0
    card = card_of(file)
    assert card["cases"]["train"] == ["phantom_000", "phantom_001"]
    assert [source["file"] for source in card["weights"]] == ["fold0.pt", "fold1.pt"]
    with pytest.raises(ValueError, match="cannot be averaged with others"):
        segmenter([file, files[0]])


@needs_onnx
def test_resnext_unet_exports(tmp_path, monkeypatch):
    """Use one block per layer, all different, as the exporter takes a minute for all sixteen."""
    layer = resnext_unet._layer
    monkeypatch.setattr(resnext_unet, "_layer", lambda i, o, blocks, stride: layer(i, o, 1, stride))
    torch.manual_seed(0)
    model = ResNeXtUNet().eval()
    card = {"settings": model.settings, "stride": model.stride, "image_size": 32}
    path = tmp_path / "resnext_unet.onnx"
    path.write_bytes(exporting.to_onnx(exporting.trace(model, "float32"), card))
    network = OnnxNetwork(path, ["cpu"])
    assert exporting.largest_difference(network, model, torch.randn(2, 3, 32, 32)) < 1e-4


# What the file contains


def test_the_card_travels_inside(onnx, tmp_path):
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(onnx.read_bytes())
    card = card_of(alone)
    assert card["image_size"] == 32 and card["neighbours"] == 0 and card["model"] == "unet"
    assert card["settings"] == {"in_channels": 3, "out_channels": 1, "init_features": 4}
    assert card["cases"]["train"] == TRAINED_ON and card["weights"]["file"] == "narrow.pt"
    assert segmenter(alone).image_size == 32


def test_no_path_of_this_machine_is_in_the_file(onnx):
    content = onnx.read_bytes()
    for path in (ROOT, Path(torch.__file__).parent, onnx.parent):
        assert str(path).encode() not in content


def test_torch_export_agrees_and_has_its_card(tmp_path, capsys):
    path = make_weights(tmp_path / "narrow.pt", trained_on=["TCGA_CS_4942_19970222"])
    run_export(path, tmp_path, "--format", "torch-export")
    assert "within" in capsys.readouterr().out
    extra = {"card.json": ""}
    (file,) = tmp_path.glob("narrow-*.pt2")
    network = torch.export.load(file, extra_files=extra).module()
    assert json.loads(extra["card.json"])["licence"] == exporting.LICENCE
    model = model_from_state(load_state(path), path)[1]
    assert exporting.largest_difference(network, model, torch.randn(3, 3, 48, 32)) < 1e-5


# inference.py and evaluate.py


def test_inference_scores_the_same(phantoms, onnx, weights, tmp_path, capsys):
    some = "--cases", "phantom_001", "phantom_003", "phantom_005", "--threshold", 0.3
    some += "--device", "cpu", "--no-largest-component"
    assert infer(phantoms, tmp_path / "onnx", onnx, *some, "--providers", "cpu") == 0
    assert f"segmented with {onnx} by ONNX Runtime (cpu)" in capsys.readouterr().out
    assert infer(phantoms, tmp_path / "torch", weights, *some, "--no-amp") == 0
    assert "by PyTorch (cpu)" in capsys.readouterr().out
    rows, others = table(tmp_path / "onnx"), table(tmp_path / "torch")
    assert all(row.pop(RUN) for row in rows + others), "each names its own file"
    assert rows == others
    assert [row["trained_on"] for row in rows] == ["1", "0", "0"]
    assert any(float(row["dsc"]) > 0 for row in rows), "so that equality means something"


def test_evaluate_compares_both(phantoms, onnx, weights, tmp_path):
    words = ["--images", phantoms, "--out", tmp_path, "--cases", "phantom_003", "phantom_004"]
    words += ["--subset", "all", "--device", "cpu", "--providers", "cpu", "--no-amp"]
    evaluate.main([str(w) for w in (*words, "--weights", f"torch={weights}", f"onnx={onnx}")])
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["models"]["onnx"]["difference"]["mean"] == 0
    (about,) = summary["weights"]["onnx"].values()
    assert about["runtime"] == "ONNX Runtime (cpu)" and about["half_precision"] is False


# What is refused


@pytest.mark.parametrize("share", [0.001, 0.999])
@pytest.mark.parametrize("renamed", [False, True])
def test_a_file_cut_short_is_refused(phantoms, onnx, tmp_path, share, renamed):
    file, whole = tmp_path / ("x.onnx" if renamed else onnx.name), onnx.read_bytes()
    file.write_bytes(whole[: int(len(whole) * share)])
    message = refused(phantoms, tmp_path, file)
    assert message.startswith(f"error: {file}: is damaged") and "export" in message


def test_one_flipped_bit_is_noticed(phantoms, onnx, tmp_path):
    content = bytearray(onnx.read_bytes())
    content[len(content) // 2] ^= 1
    file = tmp_path / onnx.name
    file.write_bytes(content)
    assert f"{file}: is damaged: its SHA-256" in refused(phantoms, tmp_path, file)


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"\x08\x0a\x12\x07pytorch"])
def test_a_file_that_export_did_not_write_is_refused(phantoms, tmp_path, content):
    file = tmp_path / "x.onnx"
    file.write_bytes(content)
    message = refused(phantoms, tmp_path, file)
    assert message.startswith(f"error: {file}: is damaged, or not an ONNX file")
    assert "export.py --format onnx" in message


@needs_onnx
def test_a_sound_onnx_file_of_another_model_is_refused(phantoms, tmp_path):
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in ("slices", "y")]
    node = helper.make_node("Relu", ["slices"], ["y"])
    graph = helper.make_graph([node], "g", value[:1], value[1:])
    model = helper.make_model(
        graph, ir_version=8, opset_imports=[helper.make_opsetid("", exporting.OPSET)]
    )
    file = tmp_path / "x.onnx"
    file.write_bytes(model.SerializeToString())
    assert f"{file}: is not an ONNX file that export.py wrote" in refused(phantoms, tmp_path, file)


def test_what_onnx_runtime_cannot_run_is_one_sentence(phantoms, onnx, tmp_path):
    file = tmp_path / "x.onnx"
    file.write_bytes(onnx.read_bytes().replace(b"ConvTranspose", b"ConvUnheardOf"))
    message = refused(phantoms, tmp_path, file)
    assert message.startswith(f"error: {file}: ONNX Runtime ") and "cannot run it" in message


def test_onnx_runtime_writes_no_log_of_its_use(onnx, tmp_path):
    """Some builds may record usage under a machine identifier, to be sent to the vendor."""
    code = f"from brainseg.onnx import OnnxNetwork; OnnxNetwork({str(onnx)!r}, ['cpu'])"
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env={k: v for k, v in os.environ.items() if k[:4] not in ("XDG_", "ORT_")}
        | {"HOME": str(tmp_path)},
        cwd=ROOT,
    )
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_files_and_options_that_do_not_fit_are_refused(phantoms, onnx, weights, tmp_path):
    run, missing = (phantoms, tmp_path), tmp_path / "x.onnx"
    assert f"{missing}: no such ONNX file" in refused(*run, missing)
    assert "leave out --amp" in refused(*run, onnx, "--amp")
    assert "is not an ONNX file" in refused(*run, weights, "--providers", "cpu")
    assert "not a multiple of 16" in refused(*run, onnx, "--image-size", 40)
    assert "device 'nonsense'" in refused(*run, onnx, "--device", "nonsense")
    with pytest.raises(SystemExit, match="--providers is for .onnx files"):
        words = "--images", phantoms, "--weights", weights, "--providers", "cpu"
        evaluate.main([str(word) for word in words])


@needs_onnx
def test_a_provider_that_is_not_installed_is_named(phantoms, onnx, tmp_path):
    import onnxruntime

    if PROVIDERS["cuda"] in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has the CUDA provider")
    for options in (("--providers", "cuda"), ("--device", "cuda")):
        message = refused(phantoms, tmp_path, onnx, *options)
        assert "'cuda'" in message and "available: cpu" in message and "onnxruntime-gpu" in message


def test_a_provider_that_does_not_start_is_named(onnx, monkeypatch):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: list(PROVIDERS.values()))

    class Started:
        get_providers = staticmethod(lambda: [PROVIDERS["cpu"]])

    monkeypatch.setattr(OnnxNetwork, "_session", lambda _: Started)
    with pytest.raises(ValueError, match="'tensorrt' does not start"):
        OnnxNetwork(onnx, ["tensorrt", "cpu"])
    assert OnnxNetwork(onnx).provider == "cpu", "what was not asked for by name need not start"


def test_available_providers_are_used_fastest_first():
    every, cpu = list(PROVIDERS.values()), [PROVIDERS["cpu"]]
    assert pick_providers(None, "", [*cpu, "AzureExecutionProvider"]) == ["cpu"]
    assert pick_providers(None, "", every[::-1]) == ["tensorrt", "cuda", "cpu"]
    assert pick_providers(None, "cuda", every) == ["tensorrt", "cuda"]
    assert pick_providers(None, "cpu", every) == ["cpu"]
    assert pick_providers(["cpu", "cuda"], "", every) == ["cpu", "cuda"]
    with pytest.raises(ValueError, match="'cuda' does not run on the device 'cpu'"):
        pick_providers(["cuda"], "cpu", every)
    with pytest.raises(ValueError, match="'mps': ONNX Runtime has no provider for it"):
        pick_providers(None, "mps", every)


def test_tensorrt_gets_one_engine_for_every_batch(onnx):
    options = OnnxNetwork(onnx, ["cpu"])._tensorrt_options(16, 64)
    assert options["trt_profile_min_shapes"] == "slices:1x3x64x64"
    assert options["trt_profile_max_shapes"] == "slices:16x3x64x64"
    assert options["trt_fp16_enable"] == "False" and Path(options["trt_engine_cache_path"]).is_dir()


def test_a_missing_package_is_named(phantoms, weights, tmp_path, monkeypatch):
    for package in ("onnxruntime", "onnxscript"):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ValueError, match=rf"x: needs {package}.*-r requirements-onnx.txt"):
            import_optional(package, "x")
    with pytest.raises(SystemExit, match="error: --format onnx: needs onnxscript"):
        run_export(weights, tmp_path, "--format", "onnx")
    file = tmp_path / "x.onnx"
    file.write_bytes(b"\x12\x08brainseg")
    assert f"{file}: needs onnxruntime" in refused(phantoms, tmp_path, file)


def test_files_of_other_kinds_are_never_opened(phantoms, onnx, tmp_path):
    file = tmp_path / "x.pt2"
    file.write_bytes(b"PK")
    assert f"{file}: is an exported program, refused" in refused(phantoms, tmp_path, file)
    with pytest.raises(SystemExit, match="is an ONNX file.*give the weights"):
        run_export(onnx, tmp_path)


# An export that is not right


def test_an_export_that_disagrees_is_not_written(weights, tmp_path, monkeypatch):
    trace = exporting.trace

    def wrong(model: nn.Module, precision: str):
        model = model_from_state(model.state_dict(), "x")[1]
        model.conv.bias.data += 1
        return trace(model, precision)

    monkeypatch.setattr(exporting, "trace", wrong)
    with pytest.raises(SystemExit, match="not written, as its probabilities differ by up to 0"):
        run_export(weights, tmp_path, "--format", "torch-export")
    assert not list(tmp_path.iterdir())


def test_a_difference_of_nan_is_not_ignored():
    def network(x: torch.Tensor) -> torch.Tensor:
        return torch.full_like(x, float("nan") if x.shape[0] == 1 else 0)

    model = nn.Identity()
    model.stride = 16
    assert np.isnan(exporting.largest_difference(network, model, torch.zeros(2, 1, 16, 16)))


def test_options_of_other_formats_are_a_usage_error(weights, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_export(weights, tmp_path, "--precision", "float16")
    assert "--precision and --images go with --format" in capsys.readouterr().err
