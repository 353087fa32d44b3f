"""Options of the commands, settings from a file, and one sentence for each error."""

import argparse
import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import torch

from brainseg.io.files import out_of_memory, sentence
from brainseg.preprocess import VERSION
from brainseg.weights import MODELS
from loss import LOSSES
from utils import signal_handlers

SWITCH = argparse.BooleanOptionalAction  # --x and --no-x
FLAGS, DEFAULTS = "given", "by default"  # where the value of a setting is from
Layer = tuple[str, dict[str, Any]]  # where some settings are from, and their values
# Not taken over by --resume: folder and machine may have changed.
OF_THIS_CALL = ("weights", "device", "workers", "resume", "config", "prune_cache")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that also reads --config FILE and remembers where each value is from.

    FILE is YAML (so JSON too): `batch-size: 8` or `batch_size: 8` is --batch-size 8, true and
    false switch a flag on and off, null leaves it at its default. Flags on the command line win.
    The args.json of a run works too. An unknown key or a bad value is a usage error.
    """

    def __init__(self, **options: Any):
        super().__init__(allow_abbrev=False, **options)
        self.settings: dict[str, argparse.Action] = {}
        self.recipe: list[str] = []  # settings that change the result of a training
        self.classic: dict[str, Any] = {}  # values that --recipe classic sets
        self.sources: dict[str, str] = {}  # where the value of each setting is from
        self._group, self._in_recipe = self._optionals, False

    def group(self, title: str, recipe: bool = False) -> None:
        """Begin a group of the help, for the options added from here on; maybe of the recipe."""
        self._group, self._in_recipe = self.add_argument_group(title), recipe

    def add(
        self,
        *flags: str,
        help: str,
        least: float | None = None,
        below: float | None = None,
        classic: Any = None,
        **options: Any,
    ) -> None:
        """Add an option, a number within bounds; its help names default and `classic` value."""
        if "action" not in options:
            options.setdefault("type", str)
        if least is not None or below is not None:
            options["type"] = _number(options["type"], least, below)
        default = options.get("default")
        if classic is not None:
            help += f" ({default}; classic: {classic})"
        elif default is not None and not isinstance(default, (bool, list)):
            help += f" ({default})"
        action = self._group.add_argument(*flags, help=help, **options)
        self.settings[action.dest] = action
        if self._in_recipe:
            self.recipe.append(action.dest)
        if classic is not None:
            self.classic[action.dest] = classic

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        """Read the command line and the file of --config; end with a usage error if it is bad."""
        return self.resolve(self.read(args))

    def read(self, argv: Sequence[str] | None) -> list[Layer]:
        """Read what the command line sets, and what the file of --config sets."""
        unset = argparse.Namespace(**dict.fromkeys(self.settings))
        flags = vars(super().parse_args(argv, unset))
        layers = [(FLAGS, flags)]
        file = flags["config"]
        if file:
            try:
                layers.append((f"from {file}", read_config(file, self)))
            except (ValueError, argparse.ArgumentError) as error:
                self.error(f"{file}: {error}")
        return layers

    def resolve(self, layers: Sequence[Layer]) -> argparse.Namespace:
        """Give each setting the value of the first layer that has one, else its default."""
        args = argparse.Namespace()
        for name, action in self.settings.items():
            self.sources[name], value = DEFAULTS, action.default
            for source, values in layers:
                if values.get(name) is not None:
                    self.sources[name], value = source, values[name]
                    break
            if isinstance(value, str):
                value = self._get_value(action, value)
            setattr(args, name, value)
        return args

    def converted(self, action: argparse.Action, name: str, value: Any) -> Any:
        """Convert the value of a setting in a file; ValueError or ArgumentError if it is bad."""
        if action.nargs == 0:
            if not isinstance(value, bool):
                raise ValueError(f"{name} takes true or false, not {value!r}")
            return value
        if value is True and action.nargs == "?":
            return action.const
        values = [value]
        if isinstance(value, list) and action.nargs == "+":
            values = value
        if not values or any(isinstance(each, (bool, list, dict)) for each in values):
            raise ValueError(f"{name} takes a value, not {value!r}")
        return self._get_values(action, list(map(str, values)))

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        """Expand ~ in PATH and NAME=PATH, as shells do only for some, and convert the text."""
        name, equals, path = arg_string.partition("=")
        if arg_string.startswith("~"):
            arg_string = os.path.expanduser(arg_string)
        elif path.startswith("~"):
            arg_string = name + equals + os.path.expanduser(path)
        return super()._get_value(action, arg_string)


def resume(parser: Parser, given: Sequence[Layer], earlier: dict, path: Path) -> argparse.Namespace:
    """Resolve with a checkpoint's settings as defaults; ValueError if the recipe would change."""
    values = dict(parser.classic)
    for name, value in earlier.items():
        if value is not None and name not in OF_THIS_CALL:
            values[name] = value
    layer = (f"from {path}", values)
    before = parser.resolve([layer])
    args = parser.resolve([*given, layer])
    for name in parser.recipe:
        was, now = getattr(before, name), getattr(args, name)
        if name == "teachers" and was and now:
            continue  # they may have moved: train.py compares their hashes
        if was != now:
            raise ValueError(
                f"{path}: was started with --{name.replace('_', '-')} {was}, not {now}; "
                "leave that out, or start a new run in another --weights folder"
            )
    return args


def summary(parser: Parser, args: argparse.Namespace) -> str:
    """Say the values of the recipe: a line for each place that they are from."""
    lines: dict[str, list[str]] = {}
    for name in parser.recipe:
        value = getattr(args, name)
        if value is not None and value is not False:
            lines.setdefault(parser.sources[name], []).append(f"{name.replace('_', ' ')} {value}")
    return "\n".join(f"{', '.join(values)} ({source})" for source, values in lines.items())


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


def read_config(path: Path, parser: Parser) -> dict[str, Any]:
    """Read the settings in a file, converted as flags are; ValueError or ArgumentError if bad."""
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
    actions = {}
    for action in parser.settings.values():
        for flag in action.option_strings:
            if not flag.startswith("--no-"):
                actions[flag[2:]] = action
    settings = {}
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name not in actions:
            near = difflib.get_close_matches(name, actions, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            raise ValueError(f"no setting is called {key!r}; {hint}")
        if value is not None and name != "config":
            settings[actions[name].dest] = parser.converted(actions[name], name, value)
    return settings


class Formatter(argparse.MetavarTypeHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Show types, and the description as it is."""

    def __init__(self, prog: str, **_: Any):
        super().__init__(prog, max_help_position=32, width=100)


def make_parser(doc: str | None) -> Parser:
    """Make a parser whose --help is the script's docstring, then the options and their defaults."""
    doc = f"{doc}\nDefaults are in parentheses."
    parser = Parser(usage="%(prog)s [options]", description=doc, formatter_class=Formatter)
    parser.add("--config", type=Path, help="YAML or args.json with any of these settings")
    return parser


# fmt: off
def add_cohort_options(parser: Parser) -> None:
    """Add the options of scripts that read a cohort."""
    add = parser.add
    add("--sequences", nargs="+",
        help="file names in the folder of a case: flair='*_f.nii.gz' pre=... post=... mask=...")
    add("--channels", type=int, nargs="+", least=0,
        help="of files with several: those of pre-contrast, FLAIR, post-contrast, or FLAIR; from 0")
    add("--labels", type=int, nargs="+", least=1,
        help="mask labels that count as lesion (all above 0)")
    add("--patients", help="CSV with the columns case and patient (from the names)")


def cohort_options(args: argparse.Namespace) -> dict:
    """Collect the options of `list_cohort`."""
    return {name: getattr(args, name) for name in ("sequences", "channels", "labels", "patients")}


def add_recipe_options(parser: Parser) -> None:
    """Add what changes the result of a training; it is in the card, and --resume keeps it."""
    add = parser.add
    parser.group("data", recipe=True)
    add_cohort_options(parser)
    add("--image-size", type=int, default=192, classic=256, least=32,
        help="side of a resized slice; as in --init-weights")
    add("--preprocessing", type=int, choices=(1, 2), default=VERSION, classic=1,
        help="1: sequences scaled together; 2: apart; as in --init-weights")
    add("--validation", nargs="+", help="cases or patients to validate on; others train")
    add("--folds", type=int, least=2, help="cross-validation: number of folds, split by patient")
    add("--fold", type=int, least=0, help="cross-validation: the fold to validate on, from 0")

    parser.group("network", recipe=True)
    add("--model", choices=MODELS, default="unet", help="the network")
    add("--features", type=int, default=16, classic=32, least=1,
        help="unet: channels of the first level; as in --init-weights")
    add("--pretrained", nargs="?", const=True, help="resnext_unet: ImageNet weights, or their file")
    add("--neighbours", type=int, default=0, classic=0, least=0,
        help="adjacent slices seen on either side of each; as in --init-weights")

    add_sampling_options(parser)


def add_sampling_options(parser: Parser) -> None:
    """Add the settings of sampling, augmentation, optimisation and precision."""
    add = parser.add
    parser.group("recipe", recipe=True)
    add("--recipe", choices=("classic",), help="the values published in 2019 as defaults")
    add("--batch-size", type=int, default=16, least=1, help="slices per step")
    add("--lr", type=float, default=2e-3, classic=1e-4, least=0, help="peak learning rate")
    add("--schedule", choices=("constant", "cosine"), default="cosine",
        classic="constant", help="learning-rate schedule; cosine falls to 0 at the last epoch")
    add("--warmup", type=int, default=100, classic=0, least=0, help="steps of linear warm-up")
    add("--ema", type=float, default=0.998, classic=0.0, least=0, below=1,
        help="decay of the averaged weights; 0: off")
    add("--weight-decay", type=float, default=0, least=0, help="for AdamW; 0: plain Adam")
    add("--loss", choices=LOSSES, default="bce-dice", classic="dice", help="loss function")
    add("--background", type=float, default=0.5, classic=0.1, least=0, below=1e6,
        help="draw slices in proportion to lesion area plus this times the case's mean area")
    add("--aug-scale", type=float, default=0.2, classic=0.05, least=0, below=1, help="1 ± this")
    add("--aug-angle", type=float, default=15, least=0, help="rotation, ± degrees")
    add("--aug-intensity", type=float, default=0.2, classic=0, least=0, help="gain, shift: ± this")
    add("--drop-sequences", type=float, default=0.4, classic=0, least=0, below=1,
        help="with 3 sequences: share of slices whose post-contrast is replaced by FLAIR")
    add("--flair-alone", action=SWITCH, default=False,
        help="replace pre-contrast in all of these slices, not in half of them (no)")
    add("--strip-skulls", type=float, default=0, least=0, below=1,
        help="share of slices whose skull is removed, crudely")
    add("--teachers", type=Path, help="ensemble to learn from, beside the masks, as its student")
    add("--seed", type=int, default=42, least=0, help="seed of every random draw")
    add("--keep", choices=("best", "last"), default="best", help="epoch to keep, by validation DSC")
    add("--amp", action=SWITCH, help="bfloat16, or float16 on older GPUs (if bfloat16 is fast)")
    add("--sync-bn", action="store_true", help="batch norm over the whole batch across GPUs")


def add_segmenter_options(parser: Parser, workers: bool = True) -> None:
    """Add the options of scripts that segment; `segmenter_options` reads them."""
    parser.group("how")
    add = parser.add
    add("--image-size", type=int, help="side of a resized slice (as in training)")
    add("--threshold", type=float,
        help="lowest probability that counts as lesion (as in the card, or 0.5)")
    add("--largest-component", action=SWITCH,
        help="keep only the largest connected component (as in the card, or yes)")
    add("--min-volume", type=int, least=0,
        help="drop components of fewer voxels of 5 mm³ (as in the card; weights/unet-folds: 200)")
    add("--tta", action=SWITCH,
        help="average over a slice and its mirror image where there may be lesion (as in the card)")
    add("--batch-size", type=int, default=16, least=1, help="slices computed at once")
    add("--device", help="cuda, cuda:1, mps, cpu (an accelerator if available)")
    add("--amp", action=SWITCH, help="compute in half precision (if the device is faster that way)")
    if workers:
        add("--workers", type=int, least=1, help="threads that read and write (all cores)")
    add("--providers", nargs="+", choices=("tensorrt", "cuda", "cpu"),
        help="ONNX Runtime providers for an .onnx file: tensorrt, cuda, cpu (all available)")


# fmt: on
def segmenter_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict:
    """Collect the options of a Segmenter; end with a usage error if a value cannot work."""
    if args.threshold is not None and not 0 < args.threshold < 1:
        parser.error("--threshold must be a probability between 0 and 1")
    names = "image_size threshold largest_component min_volume tta batch_size device amp providers"
    return {name: getattr(args, name) for name in names.split()}


@contextmanager
def errors_in_one_sentence(stopped: str) -> Iterator[None]:
    """Run a command; end with one sentence on bad input, with `stopped` on Ctrl-C or SIGTERM."""
    try:
        with signal_handlers({signal.SIGTERM: signal.default_int_handler}):  # as Ctrl-C does
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
