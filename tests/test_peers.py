"""Test benchmarks/peers.py at its smallest: brainseg alone, without the peer."""

import json

from benchmarks import peers


def test_a_missing_peer_does_not_stop_the_rest(phantoms, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(peers.PEERS, "MONAI", ("no_such_package", ()))
    words = ["--images", phantoms, "--device", "cpu", "--image-size", 32, "--cases", 4]
    words += ["--only", "prepare", "--peers", "MONAI", "--json", tmp_path / "peers.json"]
    peers.main([str(word) for word in words])
    result = json.loads((tmp_path / "peers.json").read_text())
    assert result["rows"]["prepare"]["brainseg"]["value"] > 0
    assert "No module named 'no_such_package'" in result["notes"]["MONAI"]
    assert "| not installed |" in capsys.readouterr().out


def test_the_target_is_read_off_the_line_of_an_epoch():
    reached = peers.reaches(0.8)
    assert reached("epoch   3/30  loss 0.2  validation loss 0.3  DSC 0.8000 *  90.1 images/s")
    assert not reached("epoch   2/30  loss 0.2  validation loss 0.3  DSC 0.7999 *  90.1 images/s")
    assert not reached("epoch   1/30  loss 0.9  90.1 images/s"), "no validation"
