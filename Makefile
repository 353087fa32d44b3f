# make demo   a synthetic data set, a training of a minute, masks and scores, in demo/
# make test   the test suite
# make lint   ruff check and ruff format --check
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/installed
	@rm -rf demo
	@$(BIN)/python phantom.py demo/images --cases 24 --size 96 --slices 16
	@$(BIN)/python train.py --images demo/images --image-size 96 --features 8 \
		--epochs 24 --lr 4e-3 --schedule cosine --warmup 20 --ema 0.98 --loss bce-dice \
		--keep last --cache demo/cache --weights demo/weights --logs demo/logs
	@$(BIN)/python inference.py --weights demo/weights/unet.pt --images demo/images \
		--subset test --predictions demo/predictions --figure demo/dsc.png
	@echo
	@echo "Look at:  demo/predictions/*.gif  and  demo/predictions/<case>/<case>_<k>.png"
	@echo "          demo/predictions/metrics.csv  and  demo/dsc.png"

test: .venv/installed-dev
	@$(BIN)/python -m pytest -q tests

lint: .venv/installed-dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .

.venv/installed: requirements.txt
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || { rm -rf .venv; \
		test "$$(id -u)" = 0 && apt-get update -qq && apt-get install -y -qq python3-venv \
		&& $(PYTHON) -m venv .venv; } || { rm -rf .venv; \
		echo "error: $(PYTHON) cannot make .venv; run: sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "installing requirements.txt into .venv (a few minutes, once)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

clean:
	rm -rf .venv demo
