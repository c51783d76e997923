# Two commands are all a new machine needs: `make compare` and `make test`.
# Each sets up .venv once (a stamp file per extra) and again only when the pins change.

VENV ?= .venv
# The first of these that is a Python the package supports; `make PYTHON=... test` overrides.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do \
    $$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1 \
    && echo $$p && break; done)
REPORT ?= report
COMPARE ?=
PYTEST ?=
CONSTRAINTS ?= constraints.txt
PINS := pyproject.toml $(CONSTRAINTS)
BIN := $(VENV)/bin
VERSIONS ?= 2.11.0 2.13.0 2.14.1 2.15.0
TORCH_VENV := build/torch-$(VERSION)
ZOO := build/zoo

.PHONY: help always compare test test-slow test-torch test-zoo torch-faults lint format dev clean

help:
	@echo 'make compare     the comparison on real data; report in $(REPORT)/'
	@echo '                 COMPARE="--task char-lm --methods sgd,caspr" passes options on'
	@echo 'make test        the test suite; PYTEST="-k kfac" passes options on'
	@echo 'make test-slow   the tests left out of it'
	@echo 'make test-torch VERSION=2.14.1   the test suite with another torch, in build/torch-2.14.1'
	@echo 'make test-zoo    models of transformers, timm and others, in $(ZOO); docs/zoo.md'
	@echo 'make torch-faults   what several versions of torch get wrong: docs/torch-faults.md'
	@echo 'make lint        ruff, pyright, and which way imports run'
	@echo 'make format      let ruff put right what it can'
	@echo 'make dev         everything needed to work on the library'

compare: $(VENV)/.stamp-compare
	$(BIN)/python -m funcprecond compare --out $(REPORT) $(COMPARE)

# One thread a worker: the tests are small, and two workers share two cores.
test: $(VENV)/.stamp-test
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(PYTEST)

test-slow: $(VENV)/.stamp-test
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow $(PYTEST)

# The pins with another torch, which brings its own setuptools. The file is written only when it
# changes, because an environment older than its pins is installed again.
build/torch-%.txt: always
	@mkdir -p build
	@sed 's/^torch==.*/torch==$*/; /^setuptools==/d' constraints.txt > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

always:

test-torch: $(if $(VERSION),$(TORCH_VENV).txt)
	@test -n '$(VERSION)' || { echo 'say which torch: make test-torch VERSION=2.14.1'; exit 2; }
	$(MAKE) test VENV=$(TORCH_VENV) CONSTRAINTS=$(TORCH_VENV).txt

# The page is written also where tests fail, and says which.
test-zoo:
	$(MAKE) VENV=$(ZOO) CONSTRAINTS=tests/zoo/constraints.txt $(ZOO)/.stamp-zoo
	rm -rf $(ZOO)-results
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 ZOO_RESULTS=$(ZOO)-results \
	    $(ZOO)/bin/python -m pytest -n 2 tests/zoo $(PYTEST); status=$$?; \
	    $(ZOO)/bin/python -m tests.zoo.table $(ZOO)-results > $(ZOO).md && \
	    cp $(ZOO).md docs/zoo.md && exit $$status

torch-faults: $(VERSIONS:%=build/torch-%.txt)
	for v in $(VERSIONS); do $(MAKE) VENV=build/torch-$$v CONSTRAINTS=build/torch-$$v.txt \
	    build/torch-$$v/.stamp-test || exit 1; done
	$(firstword $(VERSIONS:%=build/torch-%/bin/python)) -m tests.torch_faults \
	    $(VERSIONS:%=build/torch-%/bin/python) > build/torch-faults.md
	cp build/torch-faults.md docs/torch-faults.md

lint: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.stamp-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

dev: $(VENV)/.stamp-dev

# The stem of the stamp is the extra to install.
$(VENV)/.stamp-%: $(BIN)/python $(PINS)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e '.[$*]'
	@touch $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'funcprecond needs Python 3.11, 3.12 or 3.13, and none was found: install one, or name it: make PYTHON=/path/to/python3.12 ...'; exit 1; }
	$(PYTHON) -m venv $(VENV)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist
