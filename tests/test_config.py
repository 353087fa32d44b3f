"""--config: a file of settings under the names of the flags, and the args.json of a run."""

import json
from pathlib import Path

import pytest

from train import get_args_parser


@pytest.fixture
def settings(tmp_path):
    """Writes a text to a file and gives the arguments train.py makes of it and of `flags`."""

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


def test_negative_numbers_and_names_that_start_with_a_hyphen(settings):
    assert settings("lr: -1").lr == -1
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
        ("- lr", "holds no settings"),
        ("args: 3", "holds no settings"),
        ("", "holds no settings"),
        ("lr: [", "is not YAML"),
        ("lr: !!python/object/apply:os.getcwd []", "is not YAML"),
    ],
)
def test_what_cannot_be_used_names_the_file(settings, capsys, text, says):
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
    from export import get_parser

    path = tmp_path / "settings.yaml"
    path.write_text("out: there\n")
    args = get_parser().parse_args(["--config", str(path), "--weights", "w.pt"])
    assert (str(args.out), args.weights) == ("there", [Path("w.pt")])
    path.write_text("weights: w.pt\n")
    assert get_parser().parse_args(["--config", str(path)]).weights == [Path("w.pt")]
    path.write_text("out: there\n")
    with pytest.raises(SystemExit):
        get_parser().parse_args(["--config", str(path)])


def test_no_flag_is_shortened():
    with pytest.raises(SystemExit):
        get_args_parser().parse_args(["--conf", "settings.yaml"])
