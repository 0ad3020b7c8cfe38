# robustnb from a fresh clone: Python 3.11 or newer and make are enough.
#
#   make tour               one model through everything, in .venv under constraints.txt
#   make test               the tests, in the same .venv
#
# Each target installs what it needs, once: a second call installs nothing.
# TORCH_INDEX names one more package index, for machines without a GPU that should not download CUDA:
#
#   make tour TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
TORCH_INDEX ?=
ARGS ?=
NB ?=

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
DECLARED := settings.ini setup.py constraints.txt
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
BENCH := $(VENV)/.installed-bench
# Present while pip writes, and left there when it is interrupted or killed: then the files cannot be trusted.
UNFINISHED := $(VENV)/.install-unfinished

# $(call install,what to tell,requirement)
define install
	@echo 'robustnb: installing $(1) into $(VENV) (once; a few minutes on a fast line)'
	@touch $(UNFINISHED)
	@trap 'exit 130' INT TERM; $(INSTALL) -e '$(2)'; status=$$?; \
		[ $$status -gt 2 ] || rm -f $(UNFINISHED); \
		exit $$status
	@touch $@
endef

.PHONY: help
help:  ## show this list
	@echo 'make TARGET [PYTHON=python3.12] [TORCH_INDEX=https://download.pytorch.org/whl/cpu]'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

.PHONY: tour
tour: $(RUNTIME)  ## one model through everything; ARGS='--help' shows its options
	@$(BIN)/robustnb tour $(ARGS)

.PHONY: test
test: $(DEV)  ## the package equals its notebooks, every notebook runs, every test passes; ARGS='-k lsa' picks
	@$(BIN)/python -m pytest -m 'not slow' --durations=15 $(ARGS)

.PHONY: lab
lab: $(DEV)  ## JupyterLab on the notebooks
	@$(BIN)/python -m jupyter lab $(ARGS) nbs

.PHONY: notebooks
notebooks: $(DEV)  ## run the notebooks again for their committed outputs; NB='nbs/30_lsa.ipynb' picks
	@$(BIN)/python tools/run_notebooks.py $(ARGS) $(NB)

.PHONY: docs
docs: $(DOCS)  ## the site from the notebooks and their outputs, in _docs
	@$(BIN)/python tools/docs.py

.PHONY: parity
parity: bench-env  ## the same attacks in torchattacks, foolbox and ART give the same numbers, in .venv-bench
	@$(BENCH_VENV)/bin/python -m pytest tests/bench/test_parity.py --durations=5 $(ARGS)

.PHONY: bench
bench: bench-env  ## how long attacks take here, in torchattacks, foolbox and ART; ARGS='--rounds 3 --only pgd-40' picks
	@$(BENCH_VENV)/bin/python tests/bench/attacks.py $(ARGS)

# An environment of its own: torchattacks holds requests at a version of 2021, which nothing else here should have to live with.
.PHONY: bench-env
bench-env:
	@$(MAKE) --no-print-directory VENV=$(BENCH_VENV) $(BENCH_VENV)/.installed-bench

.PHONY: env
env: $(DEV)  ## install only

.PHONY: clean-env
clean-env:  ## remove the environment
	@test ! -e $(VENV) || test -f $(VENV)/pyvenv.cfg || { echo '$(VENV) is not a virtual environment'; exit 1; }
	rm -rf $(VENV)

$(RUNTIME): $(DECLARED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'robustnb needs Python 3.11 or newer, and PYTHON=$(PYTHON) is not. Name one: make tour PYTHON=python3.12'; \
		exit 1; }
	@test ! -e $(UNFINISHED) || { echo 'robustnb: the last install was cut short, starting afresh'; rm -rf $(VENV); }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(call install,what run time needs,.)

$(DEV): $(RUNTIME)
	$(call install,what development needs,.[dev])

$(DOCS): $(DEV)
	$(call install,what the site needs,.[docs])

$(BENCH): $(RUNTIME)
	$(call install,the libraries to compare with,.[bench])
