"""Run many trainings, several at once, each a call of train.py that can be stopped and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from brainseg.devices import available_cores
from brainseg.io.files import write_json
from brainseg.weights import read_card

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Training:
    """One call of train.py, whose weights and log go to `folder`."""

    folder: Path
    options: tuple[str, ...]

    @property
    def weights(self) -> Path:
        return self.folder / "unet.pt"

    @property
    def checkpoint(self) -> Path:
        return self.weights.with_suffix(".ckpt")

    @property
    def log(self) -> Path:
        return self.folder / "log.txt"

    def claim(self) -> None:
        """Note the options in the folder; raise ValueError if it holds a training with others."""
        path = self.folder / "options.json"
        if not path.exists():
            write_json(path, {"options": self.options})
        elif json.loads(path.read_text())["options"] != list(self.options):
            raise ValueError(
                f"{self.folder}: holds a training with other options; name another --out"
            )

    @property
    def card(self) -> dict:
        return read_card(self.weights)

    @property
    def done(self) -> bool:
        try:
            card = self.card
        except ValueError:  # it was killed between weights and card: --resume puts that right
            return False
        return bool(card) and card["epoch"] >= card["recipe"]["epochs"]

    def command(self) -> list[str]:
        words = ["--weights", self.folder, "--logs", self.folder / "logs"]
        resume = ["--resume"] if self.checkpoint.exists() else []
        return script("train.py", *words, *self.options, *resume)

    def last_line(self) -> str:
        """Return the line of the last epoch if it is done, else the last line of its log."""
        lines = [line.strip() for line in self.log.read_text().splitlines() if line.strip()]
        epochs = [line for line in lines if line.startswith("epoch")]
        return ((self.done and epochs) or lines or ["no output"])[-1]


class Pool:
    """Runs trainings, `jobs` at once, at low priority, each on its share of the cores.

    On an interruption, each training saves and stops first.
    """

    def __init__(self, jobs: int):
        self.jobs = jobs
        threads = max(1, available_cores() // jobs)
        self.environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        self.lock, self.running, self.closed = threading.Lock(), set(), False

    def run(self, what: str, trainings: Sequence[Training]) -> list[Training]:
        """Run the trainings that are not done yet; return all that are done at the end."""
        for training in trainings:
            training.claim()
        left = [training for training in trainings if not training.done]
        executor = ThreadPoolExecutor(self.jobs)
        with tqdm(total=len(left), desc=what, unit="training", disable=None) as bar:
            try:
                futures = {executor.submit(self._train, training): training for training in left}
                for future in as_completed(futures):
                    future.result()
                    tqdm.write(f"{futures[future].folder}: {futures[future].last_line()}")
                    sys.stdout.flush()
                    bar.update()
            except BaseException:
                self._stop()
                raise
            finally:
                executor.shutdown(cancel_futures=True)
        return [training for training in trainings if training.done]

    def _train(self, training: Training) -> None:
        with open(training.log, "a") as log:
            with self.lock:
                if self.closed:
                    return
                process = subprocess.Popen(
                    ["nice", *training.command()], stdout=log, stderr=log, env=self.environment,
                    start_new_session=True,  # Ctrl-C must reach it only through _stop
                )  # fmt: skip
                self.running.add(process)
            process.wait()
            with self.lock:
                self.running.discard(process)

    def _stop(self) -> None:
        with self.lock:
            self.closed = True
            for process in self.running:
                process.terminate()


def script(name: str, *words: object) -> list[str]:
    """Build the command that runs a script of the project."""
    return [sys.executable, str(ROOT / name), *map(str, words)]


def call(command: list[str]) -> None:
    """Run a script; raise ValueError with the reason if it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"{' '.join(command[1:])}: {reason.removeprefix('error: ')}")
