#!/usr/bin/env bash
# torch.load refuses a checkpoint that holds torch's own version.
#
# torch.__version__ looks and prints like a str, and is an instance of it: but it is a TorchVersion,
# which torch.save keeps as such, and which torch.load (2.13.0), with weights_only=True, its default
# since 2.6, does not know. Whoever notes in a checkpoint by which version it was made, as a record
# of provenance asks for, cannot open it again without running whatever code it may hold; saving
# gives no warning. In JSON, and if taken out of it again, it is a str, so that copying a model's
# card into the checkpoint works or not depending on whether it was on disk in between. What helps:
# store str(torch.__version__).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import json
import pickle
import sys

import torch

cards = {
    "torch.__version__": torch.__version__,
    "the same out of JSON": json.loads(json.dumps(torch.__version__)),
    "str(torch.__version__)": str(torch.__version__),
}
seen = []
for name, version in cards.items():
    path = f"{sys.argv[1]}/checkpoint.pt"
    torch.save({"weight": torch.zeros(2), "torch": version}, path)
    try:
        torch.load(path)
        opened = True
    except pickle.UnpicklingError:
        opened = False
    seen.append((isinstance(version, str), type(version).__name__, opened))
    print(f"{name}: a str: {seen[-1][0]}, type {seen[-1][1]}, torch.load opens it: {opened}")
sys.exit(seen != [(True, "TorchVersion", False), (True, "str", True), (True, "str", True)])
PYTHON
