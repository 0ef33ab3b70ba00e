# make quickstart   trains a small masked diffusion model on embedded text, on the CPU
# make test         the default test suite; make test-slow: the long statistical runs too
# make bench        benchmarks at the S and M shapes; writes BENCH, by default runs/bench.json
# make house        size and shape of the package, and the CPU time of its tests
# make wheel        builds dist/mdm_jax-*.whl and tries it in a fresh environment
# make docs         the documentation site, build/site/index.html; warnings are errors
# make lint         style;  make format: apply it
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
WORKDIR ?= runs/quickstart
CONFIG ?= quickstart
BENCH ?= runs/bench.json
RUN := $(VENV)/bin/python

.PHONY: quickstart test test-slow bench house wheel docs lint format clean

quickstart: $(VENV)/installed
	$(VENV)/bin/mdm train --config=$(CONFIG) --workdir=$(WORKDIR)
	@if [ $(CONFIG) = quickstart ]; then echo; cat experiments/results/text_ar.txt; fi

test: $(VENV)/installed-dev
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-slow: $(VENV)/installed-dev
	$(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "slow or not slow"

bench: $(VENV)/installed
	$(RUN) -m experiments.benchmarks --shapes=S,M --rounds=2 --seconds=10 --out=$(BENCH)

house: $(VENV)/installed-dev
	$(RUN) -m experiments.house --suite

wheel: $(VENV)/installed-dev
	$(RUN) -m experiments.wheel --out=dist

# Not --quiet: then warnings would not be errors.
docs: $(VENV)/installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build -f docs/site/mkdocs.yml

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

# Markers, so that an install happens once and again after setup.py changes.
$(VENV)/installed: setup.py
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/installed-dev: setup.py
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@ $(VENV)/installed

$(VENV)/installed-docs: setup.py
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache
