"""Signals, and what a run was made with."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from brainseg.io.files import MARK


class Interruption(ExitStack):
    """Note the first SIGINT or SIGTERM within the block, so that a step can finish first."""

    signal = 0  # none yet

    def __enter__(self) -> Interruption:
        self.enter_context(signal_handlers({signal.SIGINT: self._note, signal.SIGTERM: self._note}))
        return self

    def _note(self, number: int, _frame: object) -> None:
        if self.signal:  # asked twice: do not wait
            raise KeyboardInterrupt
        self.signal = number


@contextmanager
def signal_handlers(handlers: dict[int, Callable]) -> Iterator[None]:
    """Handle signals so within the block, in the main thread; nothing changes in another."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def plain(args: argparse.Namespace) -> dict:
    """Convert the arguments to types that JSON and a checkpoint can hold."""
    return json.loads(json.dumps(vars(args), default=str))


def provenance(args: argparse.Namespace) -> dict:
    """Describe a run for args.json: arguments (a valid --config), commit and versions."""
    versions = {}
    for name in ("torch", "numpy", "scikit-image", "medpy"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {"program": MARK, "args": plain(args), "commit": git_commit(), "versions": versions}


def git_commit() -> str | None:
    """Return the commit of this repository, marked if files differ; None outside git."""
    root = Path(__file__).resolve().parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
