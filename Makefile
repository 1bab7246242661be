# For a fresh machine with Python 3.10+, a C++ compiler, make and git.
#   make demo                      train, test and draw predictions on a small data set
#   make test                      all tests
#   make page                      try the demo's models on a page in the browser
#   make setup PYTHON=python3.12   another interpreter
#   make setup VENV=~/envs/vheat   another place

PYTHON ?= python3
VENV ?= .venv
RUN := $(abspath $(VENV))/bin/python
export PYTHON

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-seg demo-cls gallery page test speed lint package format doctor clean clean-env

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo '  variables: PYTHON (default python3), VENV (default .venv), OUT (default demo_out)'

setup: ## environment in VENV, mmcv compiled once into a cached wheel
	@.dev_scripts/setup_env.sh "$(VENV)"

demo: setup ## train a small vHeat Mask R-CNN from scratch, test it, draw predictions
	@$(RUN) demo/demo.py detection --out "$(or $(OUT),demo_out)"

demo-seg: setup ## the same for a small vHeat UPerNet
	@$(RUN) demo/demo.py segmentation --out "$(or $(OUT),demo_out)"

demo-cls: setup ## the same for a small vHeat classifier of textures
	@$(RUN) demo/demo.py classification --out "$(or $(OUT),demo_out)"

gallery: setup ## docs/gallery.md and its pictures, from what make demo demo-seg demo-cls left in OUT
	@$(RUN) .dev_scripts/make_gallery.py --demos "$(or $(OUT),demo_out)"

page: setup ## a page in the browser with the demos' models, on port PORT
	@$(RUN) tools/web_demo.py --demo "$(or $(OUT),demo_out)" --port "$(or $(PORT),7860)"

test: setup ## all tests
	@$(RUN) -m pytest

speed: setup ## limits on the time relative to Swin-T, on 2 idle CPU cores, about 6 minutes
	@$(RUN) -m pytest tests/speed/speed.py

lint: setup ## ruff, mypy, README's tables of models, the built package
	@$(RUN) -m ruff check .
	@$(RUN) -m ruff format --check .
	@$(RUN) -m mypy
	@$(RUN) .dev_scripts/update_model_tables.py --check
	@$(RUN) .dev_scripts/build_package.py

package: setup ## sdist and wheel in dist, checked
	@$(RUN) .dev_scripts/build_package.py dist

format: setup ## let ruff rewrite what it can
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

doctor: setup ## environment check: which parts of the stack work here
	@$(RUN) -m vheat_mm.doctor

clean: ## remove builds, caches and the demo's output
	rm -rf build dist *.egg-info demo_out .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +

clean-env: ## remove VENV (the cached mmcv wheel stays)
	rm -rf "$(VENV)"
