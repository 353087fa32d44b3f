"""Code shared by the commands, torch.hub and the server."""

import importlib.util
import sys
from pathlib import Path

# torch.hub puts this repository on the `sys.path` of a program that may have its own module `unet`:
# the network is therefore loaded by path, as brainseg.unet. Nothing else in the repository's root
# is imported here.
_spec = importlib.util.spec_from_file_location(
    "brainseg.unet", Path(__file__).resolve().parents[1] / "unet.py"
)
unet = importlib.util.module_from_spec(_spec)
sys.modules["brainseg.unet"] = unet
_spec.loader.exec_module(unet)
