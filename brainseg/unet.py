"""The network of the root's unet.py, loaded by path.

torch.hub puts this repository on the `sys.path` of a program that may have its own module `unet`.
Nothing else in the repository's root is imported by this package.
"""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for editors and type checkers
    from unet import UNet, check_input
else:
    _path = Path(__file__).resolve().parents[1] / "unet.py"
    _spec = importlib.util.spec_from_file_location("brainseg._unet", _path)
    _module = importlib.util.module_from_spec(_spec)
    sys.modules[_spec.name] = _module
    _spec.loader.exec_module(_module)
    UNet = _module.UNet
    check_input = _module.check_input

__all__ = ["UNet", "check_input"]
