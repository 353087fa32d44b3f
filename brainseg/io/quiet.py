"""What the readers of files print about odd ones: here they are checked, and refused by name."""

from __future__ import annotations

import logging
import threading
import warnings
from contextlib import ContextDecorator, ExitStack

WARNING = ("PIL", "pydicom", "highdicom")  # modules whose warnings say what is checked here
LOGGING = ("tifffile", "pydicom", "nibabel.global")


class Quiet(ContextDecorator):
    """Silence the readers' warnings and logs within a block, in all threads.

    Both are settings of the process: the first thread that enters changes them, and the last one
    that leaves puts them back.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._blocks = 0  # entered and not left yet
        self._undo = ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            self._blocks += 1
            if self._blocks > 1:
                return
            self._undo.enter_context(warnings.catch_warnings())
            for module in WARNING:
                warnings.filterwarnings("ignore", module=module)
            for name in LOGGING:
                logger = logging.getLogger(name)
                self._undo.callback(logger.setLevel, logger.level)
                logger.setLevel(logging.CRITICAL)

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                self._undo.close()


quiet = Quiet()
