"""Packages that only some features need."""

import importlib
import os
from pathlib import Path
from types import ModuleType


def import_optional(package: str, purpose: Path | str, extra: str = "onnx") -> ModuleType:
    """Import a package of requirements-<extra>.txt; ValueError, naming `purpose`, if missing."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # ONNX Runtime must not report its use
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(
            f"{purpose}: needs {package}, which is not installed; "
            f"pip install -r requirements-{extra}.txt"
        ) from error
