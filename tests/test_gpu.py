"""Test benchmarks/gpu.py on the CPU, without its trainings."""

from conftest import make_weights

from benchmarks import gpu
from benchmarks.timing import Measured


def test_gpu_benchmark_goes_on_after_a_failure(phantoms, tmp_path, monkeypatch, capsys):
    def measure(command):
        if "--compile" in command:
            raise ValueError("train.py failed; see above")
        return Measured(1, 0, "epoch 1/2  9.0 images/s\nepoch 2/2  12.5 images/s\n")

    monkeypatch.setattr(gpu, "measure", measure)
    weights = make_weights(tmp_path / "unet.pt", trained_on=[])
    monkeypatch.setattr(gpu, "shipped_weights", lambda model: weights)
    monkeypatch.setattr(gpu, "PROVIDERS", {})
    words = ["--images", phantoms, "--device", "cpu", "--shapes", "2x32", "--cache", tmp_path]
    gpu.main([str(word) for word in words])
    rows = capsys.readouterr().out.splitlines()
    assert "| train.py, 2x32, --amp | 12.5 |" in rows
    assert "| train.py, 2x32, --amp --compile | failed: train.py failed; see above |" in rows
    (speed,) = [row.split("|")[2] for row in rows if row.startswith("| PyTorch, float32 |")]
    assert float(speed) > 0
