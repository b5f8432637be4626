# make quickstart   train on the bundled samples, export, predict: about five minutes after the installation
# make quickstart-anomaly   learn from good images what normal is, find defects, export: about two minutes
# make quickstart-segmentation   learn the class of every pixel of drawn images, export: less than four minutes
# make test         ruff, mypy and pytest
#
# All use the active virtual environment, or make .venv here; none needs sudo or a GPU.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: help quickstart quickstart-anomaly quickstart-segmentation test lint typecheck pytest clean

BASE_PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),$(CURDIR)/.venv)
PYTHON := $(VENV)/bin/python
ZOO := $(PYTHON) -m zoo.cli
# Remembers for which pyproject.toml this environment was filled.
USER_READY := $(VENV)/.attnzoo-all
DEV_READY := $(VENV)/.attnzoo-dev
RUN := runs/quickstart
SAMPLES := data/samples/classification/val
DETECTOR := runs/quickstart-anomaly
DEFECTS := data/samples/anomaly/fabric/test
SEGMENTER := runs/quickstart-segmentation
SCENES := data/samples/segmentation/val/images
# Everything, in tens of minutes: make pytest PYTEST_ARGS="-n 2"
PYTEST_ARGS ?= -n 2 -m "not slow and not clients"

# What a run's record must hold: its folder, split, metric and least per cent.
reached = @$(PYTHON) -c 'import json, sys; record = json.load(open("$(1)/record.json")); \
	value, epochs = record["$(2)"]["$(3)"], record["epochs_done"]; sys.exit(0 if value >= $(4) / 100 else \
	f"$(3) {value:.2%} after {epochs:g} epochs is below $(4) %: a slow or busy machine ends on the clock")'

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

$(PYTHON):
	@$(BASE_PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "attnzoo needs Python 3.11 or newer, but $(BASE_PYTHON) is " + sys.version.split()[0] + ": make BASE_PYTHON=python3.12 ...")'
	$(BASE_PYTHON) -m venv $(VENV)

$(USER_READY): pyproject.toml | $(PYTHON)
	$(PYTHON) -m pip install --editable '.[all]'
	@touch $@

$(DEV_READY): pyproject.toml | $(PYTHON)
	$(PYTHON) -m pip install --editable '.[all,dev]'
	@touch $@ $(USER_READY)

# The run folder belongs to this target, so it may start over; `zoo fit` itself never overwrites a run.
quickstart: $(USER_READY)
	rm -rf $(RUN)
	$(ZOO) fit --config quickstart --run quickstart
	$(call reached,$(RUN),val,top1,95)
	$(ZOO) export quickstart $(RUN)/model.onnx --bundle $(RUN)/bundle
	$(ZOO) predict $(RUN)/model.onnx $$(for folder in $(SAMPLES)/*/; do ls $$folder* | head -n 1; done) --top 2
	$(ZOO) predict $(RUN)/model.onnx $(SAMPLES) --labels

quickstart-anomaly: $(USER_READY)
	rm -rf $(DETECTOR)
	@echo "--- two students learn from 40 images of good cloth what a network's layers say of each other"
	$(ZOO) fit --config anomaly/quickstart --run quickstart-anomaly
	@echo "--- images never seen before: 12 good ones, 8 each with a blob, a dent and a scratch"
	$(ZOO) test --run quickstart-anomaly
	$(call reached,$(DETECTOR),test,image_auroc,85)
	@echo "--- one file that needs no torch: images of any size in, score and heat map out"
	$(ZOO) export quickstart-anomaly $(DETECTOR)/model.onnx
	$(ZOO) predict $(DETECTOR)/model.onnx $$(for folder in $(DEFECTS)/*/; do ls $$folder* | head -n 1; done) --out $(DETECTOR)/predictions
	@echo "--- look at $(DETECTOR)/report.html and $(DETECTOR)/predictions"

quickstart-segmentation: $(USER_READY)
	rm -rf $(SEGMENTER)
	@echo "--- a small network learns to tell discs, bars and triangles from their background, pixel by pixel"
	$(ZOO) fit --config segmentation/quickstart --run quickstart-segmentation
	@echo "--- the best weights once more, over the 16 images that it never learned from"
	$(ZOO) validate --run quickstart-segmentation
	$(call reached,$(SEGMENTER),val,miou,28)
	@echo "--- one file that needs no torch: images of any size in, a class for every pixel out"
	$(ZOO) export quickstart-segmentation $(SEGMENTER)/model.onnx
	$(ZOO) predict $(SEGMENTER)/model.onnx $(SCENES) --out $(SEGMENTER)/predictions
	@echo "--- look at $(SEGMENTER)/validation.html and $(SEGMENTER)/predictions"

test: lint typecheck pytest

lint: $(DEV_READY)
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

typecheck: $(DEV_READY)
	$(PYTHON) -m mypy

pytest: $(DEV_READY)
	$(PYTHON) -m pytest $(PYTEST_ARGS)

clean:
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache
