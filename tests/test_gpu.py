"""Test benchmarks/gpu.py at its smallest, on the CPU."""

import json

import pytest

from benchmarks import gpu


def test_gpu_benchmark_goes_on_where_it_stopped(phantoms, tmp_path, monkeypatch):
    def infer(*_, **__):
        raise RuntimeError("no such provider\nin this build")

    monkeypatch.setattr(gpu, "infer", infer)

    def run(*parts: str, steps: int = 1) -> dict:
        words = ["--images", phantoms, "--device", "cpu", "--shapes", "2x32", "--steps", steps]
        gpu.main([str(word) for word in (*words, "--out", tmp_path, "--only", *parts)])
        return json.loads((tmp_path / "gpu.json").read_text())

    eager = "speed 2x32 float32 eager"
    first = run(eager, "inference tensorrt float32")["parts"]
    assert first[eager][0][1] > 0
    result = run(eager, "profile")
    assert result["parts"][eager] == first[eager], "measured once"
    counts = {what: value for what, value, _ in result["parts"]["profile"]}
    assert counts["aten::item, per step"] >= 1
    assert result["failed"] == {"inference tensorrt float32": "no such provider"}
    assert "| training, 2x32, float32, eager |" in (tmp_path / "gpu.md").read_text()
    with pytest.raises(SystemExit, match=r"has other settings \(steps\); give another --out"):
        run(eager, steps=2)
