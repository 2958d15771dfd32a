# make demo   set up, then generate with a small real model over quantized caches
# make test   set up, then lint, type-check and test
# make bench  set up, then time attention side by side with what mlx-lm does
# Needs Python 3.11 or newer, nothing else. PYTHON=python3.12 picks one; MLX=cuda13 takes MLX's CUDA build (default: cpu,
# which on macOS is MLX as always, with Metal).

PYTHON ?= python3
VENV ?= .venv
MLX ?= cpu
BIN := $(VENV)/bin

.PHONY: setup demo test bench clean
.DELETE_ON_ERROR:

setup: $(VENV)/.installed-$(MLX)

$(VENV)/.installed-$(MLX): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "qsdpa_patch needs Python 3.11 or newer; $(PYTHON) is older: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[$(MLX),test]'
	@touch $@

demo: setup
	$(BIN)/qsdpa demo $(ARGS)

bench: setup
	$(BIN)/qsdpa bench $(ARGS)

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
