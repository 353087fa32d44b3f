"""Options shared by the commands, settings from a file, and one sentence for each error."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

import torch

from brainseg.io.files import MARK, out_of_memory, sentence
from utils import sigterm_interrupts


class HomeParser(argparse.ArgumentParser):
    """An ArgumentParser that expands ~ in PATH and NAME=PATH, as shells do only for some."""

    def _get_value(self, action: argparse.Action, text: str) -> object:
        name, equals, path = text.partition("=")
        if text.startswith("~"):
            text = os.path.expanduser(text)
        elif path.startswith("~"):
            text = name + equals + os.path.expanduser(path)
        return super()._get_value(action, text)


class Parser(HomeParser):
    """An ArgumentParser that takes defaults from --config FILE and supports recipes.

    FILE is YAML (so JSON too): `batch-size: 8` or `batch_size: 8` is --batch-size 8, true and
    false switch a flag on and off, null leaves it at its default. Flags on the command line win.
    The args.json of an earlier run works too. An unknown key or an unusable value is a usage error
    that names the file.
    """

    def __init__(self, **options: object):
        super().__init__(allow_abbrev=False, **options)
        self.recipe: list[str] = []  # settings that change the result of a training
        self.presets: dict[str, dict] = {}  # defaults that --recipe NAME sets

    def group(self, title: str) -> tuple[Callable, Callable]:
        """Add a group to the help; return two versions of `add_argument`: `add` and `recipe`.

        What `recipe` adds is in the card, and a resumed run must keep it. Both take bounds, `least`
        and `below`, for numbers; the help names the default, which sets the type if none is given.
        """
        group = self.add_argument_group(title)

        def add(*flags: str, least: float | None = None, below: float | None = None, **options):
            if "action" not in options:
                options.setdefault("type", type(options.get("default", "")))
            if least is not None or below is not None:
                options["type"] = _number(options["type"], least, below)
            default = options.get("default")
            if default is not None and not isinstance(default, (bool, list)):
                key = flags[0][2:].replace("-", "_")
                others = [f"; {k}: {v[key]}" for k, v in self.presets.items() if key in v]
                options["help"] += f" (%(default)s{''.join(others)})"
            return group.add_argument(*flags, **options)

        def recipe(*flags: str, **options) -> None:
            self.recipe.append(add(*flags, **options).dest)

        return add, recipe

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        finder = HomeParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", type=Path)
        finder.add_argument("--recipe")
        finder.error = self.error
        found = finder.parse_known_args(args)[0]
        try:
            settings = _read_config(found.config) if found.config else {}
            for name in self.presets:
                if name == settings.get("recipe"):
                    self.set_defaults(**self.presets[name])
            self._take_defaults(settings)
            self.set_defaults(**self.presets.get(found.recipe, {}))  # flags win
        except (ValueError, argparse.ArgumentError) as error:
            self.error(f"{found.config}: {error}")
        return super().parse_args(args, namespace)

    def parse_resumed(
        self, argv: Sequence[str] | None, earlier: dict, path: Path
    ) -> argparse.Namespace:
        """Parse with the settings of an earlier run, from the checkpoint `path`, as defaults.

        A setting newer than the checkpoint has its default; folder and machine may have changed.
        Raises ValueError if the recipe would change.
        """
        earlier = {name: self.get_default(name) for name in self.recipe} | earlier
        here = {"weights", "device", "workers", "resume", "config", "prune_cache"}
        names = {action.dest for action in self._actions} & earlier.keys() - here
        self.set_defaults(**{name: earlier[name] for name in names})
        self.presets = {}  # `earlier` includes what they set
        args = self.parse_args(argv)
        for name in self.recipe:
            before, now = earlier[name], plain(args)[name]
            if now != before:
                raise ValueError(
                    f"{path}: was started with --{name.replace('_', '-')} {before}, not {now}; "
                    "leave that out, or start a new run in another --weights folder"
                )
        return args

    def _take_defaults(self, settings: dict) -> None:
        """Call `set_defaults` after checking names and values."""
        flags = {flag[2:]: action for flag, action in self._option_string_actions.items()}
        known = {k: v for k, v in flags.items() if k not in ("", "help") and k[:3] != "no-"}
        for key, value in settings.items():
            name = str(key).replace("_", "-")
            if name not in known:
                near = difflib.get_close_matches(name, known, 1, 0.5)
                hint = f"did you mean {near[0]}?" if near else "see --help"
                raise ValueError(f"no setting is called {key!r}; {hint}")
            if value is not None and name != "config":
                self.set_defaults(**{known[name].dest: self._checked(known[name], value)})
                known[name].required = False

    def _checked(self, action: argparse.Action, value: object) -> object:
        """Convert a value from the file as the command line would."""
        if value is True and action.nargs == "?":
            return action.const
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise ValueError(f"{action.dest} takes true or false, not {value!r}")
            return value
        several = isinstance(value, list) and action.nargs in ("+", "*") and value
        values = value if several else [value]
        if any(isinstance(each, (bool, list, dict)) for each in values):
            name = action.dest.replace("_", "-")
            raise ValueError(f"{name} takes a value, not {value!r}")
        return self._get_values(action, list(map(str, values)))


def _number(kind: type, least: float | None, below: float | None) -> Callable[[str], float]:
    """Make a type for argparse: a number, at least `least` and less than `below`."""

    def convert(text: str) -> float:
        value = kind(text)
        if least is not None and not value >= least:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        if below is not None and not value < below:
            raise argparse.ArgumentTypeError(f"must be less than {below}")
        return value

    convert.__name__ = kind.__name__  # for the help, and if `kind` rejects a text
    return convert


def _read_config(path: Path) -> dict:
    """Read the settings in a file. Raises ValueError, without its name, if it has none."""
    import yaml  # slow, and only for --config

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError("is not YAML; write one `name: value` per line") from error
    if isinstance(content, dict):  # args.json has more than the settings of its run
        content = content.get("args", content)
    if not isinstance(content, dict):
        raise ValueError("contains no settings; write one `name: value` per line")
    return content


def make_parser(doc: str) -> Parser:
    """Make a parser whose --help is the script's docstring, then the options and their defaults."""

    class Formatter(argparse.MetavarTypeHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def __init__(self, prog: str, **_: object):
            super().__init__(prog, max_help_position=32, width=100)

    doc = f"{doc}\nDefaults are in parentheses."
    parser = Parser(usage="%(prog)s [options]", description=doc, formatter_class=Formatter)
    parser.add_argument("--config", type=Path, help="YAML or args.json with any of these settings")
    return parser


# fmt: off
def add_cohort_options(add: Callable[..., object]) -> None:
    """Add the options of scripts that read a cohort, with the `add` of a parser's group."""
    add("--sequences", type=str, nargs="+",
        help="file names in the folder of a case: flair='*_f.nii.gz' pre=... post=... mask=...")
    add("--channels", type=int, nargs="+", least=0,
        help="of files with several: those of pre-contrast, FLAIR, post-contrast, or FLAIR; from 0")
    add("--labels", type=int, nargs="+", least=1,
        help="mask labels that count as lesion (all above 0)")
    add("--patients", type=str, help="CSV with the columns case and patient (from the names)")


def add_segmenter_options(parser: Parser, workers: bool = True) -> None:
    """Add the options of scripts that segment; `segmenter_options` reads them."""
    add, switch = parser.group("how")[0], argparse.BooleanOptionalAction
    add("--image-size", type=int, help="side of a resized slice (as in training)")
    add("--threshold", type=float,
        help="lowest probability that counts as lesion (as in the card; 0.5 if it has no fit)")
    add("--largest-component", action=switch,
        help="keep only the largest connected component (as in the card, or yes)")
    add("--min-volume", type=int, least=0,
        help="drop components of fewer voxels (as in the card; 200 for weights/unet-folds)")
    add("--tta", action=switch,
        help="average over a slice and its mirror image where there may be lesion (as in the card)")
    add("--batch-size", type=int, default=16, least=1, help="slices computed at once")
    add("--device", type=str, help="cuda, cuda:1, mps, cpu (an accelerator if available)")
    add("--amp", action=switch, help="compute in half precision (if the device is faster that way)")
    if workers:
        add("--workers", type=int, least=1, help="threads that read and write (all cores)")
    add("--providers", type=str, nargs="+", choices=("tensorrt", "cuda", "cpu"),
        help="ONNX Runtime providers for an .onnx file: tensorrt, cuda, cpu (all available)")


# fmt: on
def segmenter_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict:
    """Collect the options of a Segmenter; end with a usage error if a value cannot work."""
    if args.threshold is not None and not 0 < args.threshold < 1:
        parser.error("--threshold must be a probability between 0 and 1")
    names = "image_size threshold largest_component min_volume tta batch_size device amp providers"
    return {name: getattr(args, name) for name in names.split()}


def plain(args: argparse.Namespace) -> dict:
    """Convert the arguments to types that JSON and a checkpoint can hold."""
    return json.loads(json.dumps(vars(args), default=str))


def provenance(args: argparse.Namespace) -> dict:
    """Describe a run for args.json: arguments (a valid --config), commit and versions."""
    versions = {}
    for name in ("torch", "numpy", "scikit-image", "medpy"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    commit = git_commit()
    return {"program": MARK, "args": plain(args), "commit": commit, "versions": versions}


def git_commit() -> str | None:
    """Return the commit of this repository, marked if files differ; None outside git."""
    root = Path(__file__).resolve().parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@contextmanager
def errors_in_one_sentence(stopped: str) -> Iterator[None]:
    """Run a command; end with one sentence on bad input, with `stopped` on Ctrl-C or SIGTERM."""
    try:
        with sigterm_interrupts():
            yield
    except (ValueError, OSError) as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        fail(f"{sentence(error)}; use {'--device cpu' if on_gpu else 'a machine with more'}")
    except KeyboardInterrupt:
        sys.exit(stopped)


def fail(error: BaseException | str) -> NoReturn:
    """End the program with one sentence on stderr and exit status 1."""
    sys.exit(f"error: {sentence(error)}")
