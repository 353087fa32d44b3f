"""Test seeds, signals, and --config: a file of settings, or the args.json of a run."""

import json
import signal
from pathlib import Path

import pytest
import torch

from brainseg.training import make_generator
from cli import errors_in_one_sentence, fail
from train import get_args_parser
from utils import Interruption


def draws(*key: int) -> list[float]:
    return torch.rand(4, generator=make_generator(*key)).tolist()


# Seeds


def test_a_stream_is_reproducible():
    assert draws(3, 1, 4) == draws(3, 1, 4)


def test_streams_differ():
    """Another epoch, step or purpose must not get the same draws."""
    keys = [(s, k, e) for s in (0, 1, 2) for k in (0, 1) for e in range(20)]
    assert len({tuple(draws(*key)) for key in keys}) == len(keys)


@pytest.mark.parametrize("one, other", [((0,), (0, 0)), ((7, 1), (7, 1, 0)), ((7, 0, 1), (7, 1))])
def test_streams_of_other_length_differ(one, other):
    assert draws(*one) != draws(*other)


def test_stream_leaves_the_global_state_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    draws(1, 2)
    assert torch.equal(torch.rand(3), expected)


# Signals and errors


def test_first_signal_is_noted_the_second_ends_the_program():
    numbers = signal.SIGINT, signal.SIGTERM
    before = [signal.getsignal(number) for number in numbers]
    with Interruption() as interruption:
        assert not interruption.signal
        signal.raise_signal(signal.SIGTERM)
        assert interruption.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):  # asked twice
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("raised", [ValueError("x: is bad"), KeyboardInterrupt(), signal.SIGTERM])
def test_a_command_ends_in_one_sentence(raised):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop, errors_in_one_sentence("stopped; run it again"):
        if isinstance(raised, signal.Signals):
            signal.raise_signal(raised)
        raise raised
    bad = isinstance(raised, ValueError)
    assert stop.value.code == ("error: x: is bad" if bad else "stopped; run it again")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    "error, sentence",
    [
        (FileNotFoundError(2, "No such file or directory", "x.pt"), "x.pt: no such file or dir"),
        (ValueError("x: holds no case"), "x: holds no case"),
        ("stopped", "stopped"),
    ],
)
def test_fail_is_one_sentence(error, sentence):
    with pytest.raises(SystemExit, match=f"^error: {sentence}") as stop:
        fail(error)
    assert "\n" not in stop.value.code


# Settings from a file


@pytest.fixture
def settings(tmp_path):
    """Return a function that parses a settings file of this text and `flags` as train.py does."""

    def parse(text, *flags):
        path = tmp_path / "settings.yaml"
        path.write_text(text)
        return get_args_parser().parse_args(["--config", str(path), *flags])

    return parse


def test_names_are_flags_with_hyphens_or_underscores(settings):
    args = settings(
        "lr: 1e-3\nbatch-size: 4\naug_scale: 0.2\nmodel: resnext_unet\nimages: ./mine\n"
    )
    assert (args.lr, args.batch_size, args.aug_scale) == (1e-3, 4, 0.2)
    assert args.model == "resnext_unet"
    assert str(args.images) == "mine"


def test_home_is_expanded_where_no_shell_does(settings, monkeypatch, tmp_path):
    """Once, `weights: ~/runs` in a file made a folder named ~."""
    from evaluate import get_parser

    monkeypatch.setenv("HOME", str(tmp_path))
    args = settings(
        "weights: ~/runs\npatients: ~/p.csv\nsequences: [mask=~/masks/x.nii]\n", "--cache=~"
    )
    assert args.weights == tmp_path / "runs" and args.patients == f"{tmp_path}/p.csv"
    assert args.sequences == [f"mask={tmp_path}/masks/x.nii"] and args.cache == tmp_path
    (tmp_path / "s.yaml").write_text("weights: a=~/a.pt\ncases: [a~b, x=~y]\n")
    args = get_parser().parse_args(["--config=~/s.yaml", "--out=~/out~"])
    assert args.weights == [f"a={tmp_path}/a.pt"] and args.out == tmp_path / "out~"
    assert args.cases == ["a~b", "x=~y"], "there is no user y"


def test_flags_win(settings):
    assert settings("lr: 0.5\nepochs: 7", "--lr", "0.25").lr == 0.25
    assert settings("amp: true", "--no-amp").amp is False


def test_true_false_and_null(settings):
    args = settings("amp: false\nresume: false\nfolds: null\npretrained: true\ndevice:\n")
    assert args.amp is False and args.resume is False
    assert args.folds is None and args.device is None and args.pretrained is True
    assert settings("pretrained: encoder.pt").pretrained == "encoder.pt"
    assert settings("resume: true").resume is True


def test_a_list_where_a_flag_takes_several(tmp_path):
    from inference import get_parser

    path = tmp_path / "settings.yaml"
    path.write_text("cases: [a, -b]\n")
    assert get_parser().parse_args([f"--config={path}"]).cases == ["a", "-b"]
    path.write_text("cases: [a, b]\nlargest-component: false\n")
    args = get_parser().parse_args([f"--config={path}"])
    assert args.cases == ["a", "b"] and not args.largest_component


def test_negative_numbers_and_names_that_start_with_a_hyphen(settings, capsys):
    with pytest.raises(SystemExit):
        settings("lr: -1")
    assert "argument --lr: must be at least 0" in capsys.readouterr().err
    assert str(settings("images: -odd").images) == "-odd"


@pytest.mark.parametrize(
    "text, says",
    [
        ("batch_sise: 4", "no setting is called 'batch_sise'; did you mean batch-size?"),
        ("qqqq: 4", "no setting is called 'qqqq'; see --help"),
        ("lr: fast", "invalid float value: 'fast'"),
        ("model: vgg", "invalid choice: 'vgg'"),
        ("resume: 3", "resume takes true or false, not 3"),
        ("lr: true", "lr takes a value, not True"),
        ("lr: [1, 2]", "lr takes a value, not [1, 2]"),
        ("lr: {a: 1}", "lr takes a value"),
        ("epochs: 0", "argument --epochs: must be at least 1"),
        ("- lr", "contains no settings"),
        ("args: 3", "contains no settings"),
        ("", "contains no settings"),
        ("lr: [", "is not YAML"),
        ("lr: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_settings_that_cannot_be_used_name_the_file(settings, capsys, text, says):
    with pytest.raises(SystemExit) as stop:
        settings(text)
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert "settings.yaml: " in error and says in error


def test_a_bad_flag_is_not_blamed_on_the_file(settings, capsys):
    with pytest.raises(SystemExit):
        settings("lr: 1", "--epochs", "many")
    assert "settings.yaml" not in capsys.readouterr().err


def test_missing_and_binary_files(tmp_path, capsys):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(SystemExit):
            get_args_parser().parse_args(["--config", str(path)])
        assert f"{path}: cannot be read" in capsys.readouterr().err
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["--config", str(tmp_path / "binary")])
    assert "is not YAML" in capsys.readouterr().err


def test_args_json_is_a_config(tmp_path):
    from utils import provenance

    args = get_args_parser().parse_args(["--lr", "0.1", "--no-amp", "--pretrained", "--seed", "3"])
    path = tmp_path / "args.json"
    path.write_text(json.dumps(provenance(args)))
    again = get_args_parser().parse_args(["--config", str(path)])
    assert vars(again) == vars(args) | {"config": path}


def test_a_required_flag_may_be_in_either_place(tmp_path):
    import export

    get_parser = export.get_parser
    path = tmp_path / "settings.yaml"
    path.write_text("out: there\n")
    args = get_parser().parse_args(["--config", str(path), "--weights", "w.pt"])
    assert (str(args.out), args.weights) == ("there", [Path("w.pt")])
    path.write_text("weights: w.pt\n")
    assert get_parser().parse_args(["--config", str(path)]).weights == [Path("w.pt")]
    path.write_text("out: there\n")
    with pytest.raises(SystemExit):
        export.main(["--config", str(path)])


def test_flags_cannot_be_abbreviated():
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["--conf", "settings.yaml"])
