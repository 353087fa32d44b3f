"""Options that the commands share, settings from a file, seeds and signals."""

from __future__ import annotations

import argparse
import ctypes
import difflib
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch

from brainseg.io.files import sentence


class ConfigParser(argparse.ArgumentParser):
    """An ArgumentParser whose --config FILE stands for the flags that the file names.

    FILE is YAML (so JSON too): `batch-size: 8` or `batch_size: 8` is --batch-size 8, true and
    false switch a flag on and off, null leaves it at its default. Flags on the command line win.
    The args.json that a run has written is such a file. A key or value that could not be used
    ends with a usage error that names the file.
    """

    config: Path | None = None  # the file whose settings are being looked at

    def __init__(self, **options: object):
        super().__init__(allow_abbrev=False, **options)  # names are whole there, and so here

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        argv = sys.argv[1:] if args is None else list(args)
        path = self._config_in(argv)
        if path is not None:
            self.config = path
            settings = self._flags_of(path)
            required = [action for action in self._actions if action.required]
            for action in required:  # the command line may have it
                action.required = False
            super().parse_args(settings)  # alone, so that what is wrong is blamed on the file
            for action in required:
                action.required = True
            self.config = None
            argv = settings + argv
        return super().parse_args(argv, namespace)

    def error(self, message: str) -> None:
        super().error(f"{self.config}: {message}" if self.config else message)

    def _config_in(self, argv: list[str]) -> Path | None:
        finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        finder.add_argument("--config", type=Path)
        finder.error = self.error
        return finder.parse_known_args(argv)[0].config

    def _flags_of(self, path: Path) -> list[str]:
        """The settings of a file as words of a command line."""
        known = {action.dest: action for action in self._actions if action.option_strings}
        for other in ("help", "config"):
            known.pop(other)
        flags = []
        for key, value in self._read(path).items():
            action = known.get(str(key).replace("-", "_"))
            if action is None and key != "config":
                near = difflib.get_close_matches(str(key).replace("-", "_"), known, 1, 0.5)
                hint = f"did you mean {near[0].replace('_', '-')}?" if near else "see --help"
                self.error(f"no setting is called {key!r}; {hint}")
            if action is not None and value is not None:
                flags += self._words(action, value)
        return flags

    def _read(self, path: Path) -> dict:
        import yaml

        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            self.error(f"cannot be read ({error.strerror})")
        except (yaml.YAMLError, ValueError, RecursionError):
            self.error("is not YAML; write one `name: value` a line")
        if isinstance(content, dict):  # args.json says more of its run than its settings
            content = content.get("args", content)
        if not isinstance(content, dict):
            self.error("holds no settings; write one `name: value` a line")
        return content

    def _words(self, action: argparse.Action, value: object) -> list[str]:
        flag, *others = action.option_strings
        takes_value = action.nargs != 0
        if value is True and (not takes_value or action.nargs == "?"):
            return [flag]
        if value is False and not takes_value:
            return [other for other in others if other == f"--no-{flag[2:]}"]
        values = value if isinstance(value, list) and action.nargs in ("+", "*") else [value]
        if (
            not values
            or not takes_value
            or any(isinstance(each, (bool, list, dict)) for each in values)
        ):
            wanted = "a value" if takes_value else "true or false"
            self.error(f"{flag[2:]} takes {wanted}, not {value!r}")
        return [flag, *map(str, values)] if len(values) > 1 else [f"{flag}={values[0]}"]


def make_parser(doc: str) -> ConfigParser:
    """A parser whose --help is the script's docstring, then one line an option."""

    class Formatter(argparse.MetavarTypeHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def __init__(self, prog: str, **_: object):
            super().__init__(prog, max_help_position=32, width=100)

    parser = ConfigParser(usage="%(prog)s [options]", description=doc, formatter_class=Formatter)
    parser.add_argument("--config", type=Path, help="YAML or args.json with any of these settings")
    return parser


def add_cohort_options(add: Callable[..., object]) -> None:
    """The options of every script that reads a cohort, through the `add` of a parser's group."""
    add(
        "--sequences",
        type=str,
        nargs="+",
        help="names of files in the folder of a case: flair='*_f.nii.gz' pre=... post=... mask=...",
    )
    add("--labels", type=int, nargs="+", help="labels of the masks that are lesion (all above 0)")
    add("--patients", type=str, help="CSV with the columns case and patient (from the names)")


def add_segmenter_options(parser: argparse.ArgumentParser, workers: bool = True) -> None:
    """The options of every script that segments; `segmenter_options` reads them."""
    add = parser.add_argument_group("how").add_argument
    add("--image-size", type=int, help="side of a resized slice (as the weights were trained)")
    add("--threshold", type=float, default=0.5, help="least lesion probability (%(default)s)")
    add(
        "--largest-component",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep only the largest connected component (yes)",
    )
    add("--tta", action="store_true", help="average over each slice and its mirror image")
    add("--batch-size", type=int, default=16, help="slices at once (%(default)s)")
    add("--device", type=str, help="cuda, cuda:1, mps, cpu (an accelerator if there is one)")
    add(
        "--amp",
        action=argparse.BooleanOptionalAction,
        help="compute in bfloat16 (where the device is faster so)",
    )
    if workers:
        add("--workers", type=int, help="threads that read and write (all cores)")
    add(
        "--providers",
        type=str,
        nargs="+",
        choices=("tensorrt", "cuda", "cpu"),
        help="tensorrt, cuda, cpu: those of ONNX Runtime to run an .onnx file (all there are)",
    )


def segmenter_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> dict:
    """The options of a Segmenter; ends with a usage error for a value that could not work."""
    if min(args.batch_size, getattr(args, "workers", None) or 1) < 1:
        parser.error("--batch-size and --workers must be at least 1")
    if not 0 < args.threshold < 1:
        parser.error("--threshold is a probability between 0 and 1")
    names = "image_size threshold largest_component tta batch_size device amp providers".split()
    return {name: getattr(args, name) for name in names}


def plain(args: argparse.Namespace) -> dict:
    """The arguments as JSON and a checkpoint can hold them."""
    return {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}


def provenance(args: argparse.Namespace) -> dict:
    """What args.json says of a run: its arguments (a valid --config), the code and libraries."""
    versions = {}
    for name in ("torch", "numpy", "scikit-image", "medpy"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"args": plain(args), "commit": git_commit(), "versions": versions}


def git_commit() -> str | None:
    """The commit of this repository, marked if files differ from it; None outside of git."""
    root = Path(__file__).resolve().parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def make_generator(seed: int, *stream: int) -> torch.Generator:
    """A generator on the CPU for one stream of draws, e.g. `make_generator(seed, epoch)`.

    Every stream is independent of the others and can be made again at any time, which is what
    lets an interrupted training go on with the draws that it would have made.
    """
    (state,) = np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def keep_freed_memory() -> None:
    """Have glibc keep what this process frees for its next allocations, where glibc is used.

    Otherwise each large tensor is mapped anew, and its pages are cleared as they are touched.
    """
    with suppress(AttributeError, OSError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped by itself
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nothing is given back


class Interruption:
    """Remembers the first SIGINT or SIGTERM, so that the step under way can be finished first."""

    def __init__(self):
        self.signal: int | None = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: object) -> None:
        if self.signal is not None:  # asked twice: wait for nothing
            raise KeyboardInterrupt
        self.signal = number


def fail(error: BaseException | str) -> NoReturn:
    """End the program with one sentence on stderr and exit status 1."""
    sys.exit(f"error: {sentence(error)}")
