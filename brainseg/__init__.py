"""The inference core, shared by the commands, torch.hub and the server."""

import importlib.util
import sys
from pathlib import Path

# torch.hub puts this repository on the `sys.path` of somebody's program, which may have a module
# `unet`, too: the network is loaded by its path, as brainseg.unet. Nothing else of the repository's
# root is imported here.
_spec = importlib.util.spec_from_file_location(
    "brainseg.unet", Path(__file__).resolve().parents[1] / "unet.py"
)
unet = importlib.util.module_from_spec(_spec)
sys.modules["brainseg.unet"] = unet
_spec.loader.exec_module(unet)
