# make demo   a synthetic data set, a one-minute training, masks and scores, in demo/
# make test   the test suite
# make test-lowest   the same with the lowest versions that are allowed, before a bound is changed
# make lint   ruff check, ruff format --check, and pyright's basic checks (as basedpyright)
PYTHON ?= python3
BIN := .venv/bin
LOWEST := .venv-lowest/bin/python

.PHONY: demo test test-lowest lint clean python3-venv

# One thread: with more, other work on the machine makes it ten times as slow.
# Batches of 8 and a long average: while the weights change fast, the statistics of batch norm lag
# behind them, and the validation DSC dips.
demo: export OMP_NUM_THREADS = 1
demo: .venv/installed
	@rm -rf demo
	@$(BIN)/python -m brainseg.phantom demo/images --cases 24 --size 96 --slices 16
	@$(BIN)/python train.py --images demo/images --image-size 96 --features 8 \
		--epochs 16 --batch-size 8 --lr 2e-3 --warmup 40 --ema 0.99 \
		--keep last --cache demo/cache --weights demo/weights --logs demo/logs
	@$(BIN)/python inference.py --weights demo/weights/unet.pt --images demo/images \
		--subset test --predictions demo/predictions --figure demo/dsc.png
	@echo
	@echo "Look at:  demo/predictions/*.gif  and  demo/predictions/<case>/<case>_<k>.png"
	@echo "          demo/predictions/metrics.csv  and  demo/dsc.png"

test: .venv/installed-dev
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

# TORCH="==2.13.0" takes that version of PyTorch instead of the lowest.
test-lowest:
	@rm -rf .venv-lowest
	@$(PYTHON) -m venv .venv-lowest
	@$(LOWEST) -m pip install --quiet --disable-pip-version-check uv
	@echo "torch$(TORCH)" >.venv-lowest/torch.txt
	@$(LOWEST) -m uv pip compile --quiet --resolution lowest-direct -o .venv-lowest/lowest.txt \
		requirements-dev.txt .venv-lowest/torch.txt
	@$(LOWEST) -m pip install --quiet --disable-pip-version-check \
		-c .venv-lowest/lowest.txt -r requirements-dev.txt
	@OMP_NUM_THREADS=1 $(LOWEST) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests

lint: .venv/installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/basedpyright

.venv/installed: requirements.txt constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "error: Python 3.10 or later is needed; name one with make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || $(MAKE) --no-print-directory python3-venv
	@$(PYTHON) -m venv .venv
	@echo "installing requirements.txt into .venv (a few minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -r requirements.txt
	@touch $@

# Debian and Ubuntu package venv separately from python3.
python3-venv:
	@test "$$(id -u)" = 0 || \
		{ echo "error: no venv in $(PYTHON); run: sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "installing python3-venv with apt-get"
	@apt-get update -qq && apt-get install -y -qq python3-venv >/dev/null

.venv/installed-dev: .venv/installed $(wildcard requirements-*.txt)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		-c constraints.txt -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv .venv-lowest demo
