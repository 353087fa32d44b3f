"""Silence what the libraries print about odd files: the readers check these and name them."""

import logging
import threading
import warnings
from collections.abc import Callable
from contextlib import ContextDecorator, ExitStack

WARNING = ("PIL", "pydicom", "highdicom")  # modules whose warnings say what is checked here
LOGGING = ("tifffile", "pydicom", "nibabel.global")


class WhileUsed(ContextDecorator):
    """A change of the process: the first thread that enters makes it, the last one undoes it."""

    def __init__(self, change: Callable[[ExitStack], None]):
        self._change, self._undo = change, ExitStack()
        self._lock, self._blocks = threading.Lock(), 0  # entered and not left yet

    def __enter__(self) -> None:
        with self._lock:
            if self._blocks == 0:
                self._change(self._undo)
            self._blocks += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                self._undo.close()


@WhileUsed
def quiet(undo: ExitStack) -> None:
    """Silence the readers' warnings and logs."""
    undo.enter_context(warnings.catch_warnings())
    for module in WARNING:
        warnings.filterwarnings("ignore", module=module)
    for name in LOGGING:
        logger = logging.getLogger(name)
        undo.callback(logger.setLevel, logger.level)
        logger.setLevel(logging.CRITICAL)
