"""An upload on its way to the process that reads it, and back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from grid import Grid
from reader import BROKEN, Limits
from scan import Scan
from volume import Case


@dataclass(frozen=True)
class Named:
    """A file as it was sent: the name it came with and its content."""

    name: str
    content: BinaryIO


@dataclass(frozen=True)
class Loaded:
    """A case of which no file is left but what is here."""

    case: Case
    notes: list[str]
    volume: np.ndarray  # (S, H, W, C)
    truth: np.ndarray | None  # (S, H, W) bool


class Reader:
    """Has uploads read by reader.py, in a process that may break down."""

    def __init__(self, limits: Limits):
        self.limits = limits
        self.closed = False
        self._turn = threading.Lock()  # one upload at a time
        self._lock = threading.Lock()  # of `closed` and `_process`: none is started once closed
        self._process = self._start()

    def _start(self) -> subprocess.Popen:
        script = Path(__file__).resolve().with_name("reader.py")
        return subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def read(self, parts: dict[str, Sequence[Named]], folder: Path) -> Loaded:
        """The case that files make (see reader.unpack), in an empty folder that they may fill.

        Raises ValueError, naming the file, if it cannot be used.
        """
        sent = []
        for field, files in parts.items():
            for file in files:
                path = folder / f"{len(sent)}.sent"
                with open(path, "wb") as copy:
                    shutil.copyfileobj(file.content, copy)
                sent.append((field, file.name, str(path)))
        order = {"folder": str(folder), "parts": sent, "limits": asdict(self.limits)}
        answer = self._ask(order)
        if "error" in answer:
            raise ValueError(answer["error"])
        numbers, grid = tuple(answer["numbers"]), answer["grid"]
        if grid:
            shape, spacing, offset = (tuple(grid[k]) for k in ("shape", "spacing", "offset"))
            grid = Grid(shape, spacing, offset, np.array(grid["direction"]))
            case = Scan(answer["name"], numbers, (), (), grid, channels=3)
        else:
            case = Case(answer["name"], numbers, (), ())
        truth = np.load(folder / "truth.npy") if answer["truth"] else None
        return Loaded(case, answer["notes"], np.load(folder / "volume.npy"), truth)

    def _ask(self, order: dict) -> dict:
        with self._turn:
            with self._lock:
                if self.closed:
                    raise ValueError("the server is stopping")
                if self._process.poll() is not None:
                    self._process = self._start()
            try:
                self._process.stdin.write(json.dumps(order) + "\n")
                self._process.stdin.flush()
                return json.loads(self._process.stdout.readline())
            except (OSError, ValueError):
                with self._lock:
                    self._kill()
                return {"error": "the server is stopping" if self.closed else BROKEN}

    def close(self) -> None:
        """End the process, and what it reads just now."""
        with self._lock:
            self.closed = True
            self._kill()

    def _kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
