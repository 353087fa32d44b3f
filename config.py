"""Settings from a YAML file, under the names of a script's flags."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path


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
