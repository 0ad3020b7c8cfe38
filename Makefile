# robustnb from a fresh clone: Python 3.11 or newer and make are enough.
#
#   make tour               one model through everything, in .venv under constraints.txt
#   make test               the tests, in the same .venv
#   make test WORKERS=4     in four processes instead of two
#   make test-colab         the tests on what Google Colab has, in .venv-colab
#
# Each target installs what it needs, once: a second call installs nothing.
# TORCH_INDEX names one more package index, for machines without a GPU that should not download CUDA:
#
#   make tour TORCH_INDEX=https://download.pytorch.org/whl/cpu

PYTHON ?= python3
VENV ?= .venv
BENCH_VENV ?= .venv-bench
COLAB_VENV ?= .venv-colab
# Colab's Python. Under pyenv the name alone may be refused while another version is chosen.
COLAB_PYTHON ?= $(shell for python in python3.13 "$$(pyenv root 2>/dev/null)"/versions/3.13*/bin/python3.13; do \
	"$$python" -c '' 2>/dev/null && echo "$$python" && break; done)
CONSTRAINTS ?= constraints.txt
TORCH_INDEX ?=
ARGS ?=
# Processes that share out the tests, each with one core and up to 2 GB. WORKERS=0: none but pytest's own, as a debugger needs it.
WORKERS ?= 2
BENCHES ?= attacks lsa coverage idc synaptic pruning
NB ?=

SHELL := /bin/sh
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c $(CONSTRAINTS) \
	$(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
# worksteal: each process begins with a stretch of files, and takes from the end of another's when it has none left.
PYTEST := -m pytest -m 'not slow' -n $(WORKERS) --dist worksteal --durations=15
DECLARED := settings.ini setup.py constraints.txt
RUNTIME := $(VENV)/.installed-runtime
DEV := $(VENV)/.installed-dev
DOCS := $(VENV)/.installed-docs
BENCH := $(VENV)/.installed-bench
COLAB := $(VENV)/.installed-colab
# Present while pip writes, and left there when it is interrupted or killed: then the files cannot be trusted.
UNFINISHED := $(VENV)/.install-unfinished

# $(call install,what to tell,requirements)
define install
	@echo 'robustnb: installing $(1) into $(VENV) (once; a few minutes on a fast line)'
	@touch $(UNFINISHED)
	@trap 'exit 130' INT TERM; $(INSTALL) $(2); status=$$?; \
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
	@$(BIN)/python $(PYTEST) $(ARGS)

# PYTHONSAFEPATH: what is tested is the installed wheel, so nothing may put the working tree on the import path.
.PHONY: test-colab
test-colab: colab-env  ## the same on the versions Google Colab has, from the wheel as a user installs it, in .venv-colab
	@$(COLAB_VENV)/bin/python tools/colab.py install
	@PYTHONSAFEPATH=1 $(COLAB_VENV)/bin/python $(PYTEST) -o norecursedirs='.* bench' $(ARGS)

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
parity: bench-env  ## attacks, layer analysis and coverage give the same numbers as in other libraries, in .venv-bench
	@$(BENCH_VENV)/bin/python -m pytest tests/bench/test_parity.py tests/bench/test_parity_lsa.py tests/bench/test_parity_coverage.py \
		--durations=5 $(ARGS)

.PHONY: experiments
experiments: $(DEV)  ## train and judge again what nbs/experiments shows: three hours on two cores; ROBUSTNB_DATA names the folder of MNIST
	@ROBUSTNB_COMPUTE=1 $(BIN)/python tools/run_notebooks.py nbs/experiments/adversarial_training.ipynb nbs/experiments/layerwise_training.ipynb nbs/experiments/coverage_of_suites.ipynb nbs/experiments/which_units_matter.ipynb nbs/experiments/fragile_links.ipynb nbs/experiments/adversarial_pruning.ipynb

.PHONY: bench
bench: bench-env  ## how long attacks, layer analysis, coverage, importance, synaptic filters and pruning take, here and in other libraries; BENCHES=lsa ARGS='--rounds 3' picks
	@for name in $(BENCHES); do $(BENCH_VENV)/bin/python tests/bench/$$name.py $(ARGS) || exit; done

# An environment of its own: torchattacks holds requests at a version of 2021, which nothing else here should have to live with.
.PHONY: bench-env
bench-env:
	@$(MAKE) --no-print-directory VENV=$(BENCH_VENV) $(BENCH_VENV)/.installed-bench

.PHONY: colab-env
colab-env:
	@$(MAKE) --no-print-directory VENV=$(COLAB_VENV) PYTHON='$(COLAB_PYTHON)' CONSTRAINTS=constraints-colab.txt \
		$(COLAB_VENV)/.installed-colab

.PHONY: env
env: $(DEV)  ## install only

.PHONY: clean-env
clean-env:  ## remove the environments
	@for venv in $(VENV) $(BENCH_VENV) $(COLAB_VENV); do \
		test ! -e $$venv || test -f $$venv/pyvenv.cfg || { echo "$$venv is not a virtual environment"; exit 1; }; \
	done
	rm -rf $(VENV) $(BENCH_VENV) $(COLAB_VENV)

$(RUNTIME): $(DECLARED)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'robustnb needs Python 3.11 or newer, and PYTHON=$(PYTHON) is not. Name one: make tour PYTHON=python3.12'; \
		exit 1; }
	@test ! -e $(UNFINISHED) || { echo 'robustnb: the last install was cut short, starting afresh'; rm -rf $(VENV); }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(call install,what run time needs,-e .)

$(DEV): $(RUNTIME)
	$(call install,what development needs,-e '.[dev]')

$(DOCS): $(DEV)
	$(call install,what the site needs,-e '.[docs]')

$(BENCH): $(RUNTIME)
	$(call install,the libraries to compare with,-e '.[bench]')

# Never mended, always made afresh: what is there must be what Colab has, and nothing else.
$(COLAB): constraints-colab.txt
	@test -n '$(PYTHON)' && $(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 13))' || { \
		echo 'robustnb: Colab has Python 3.13, and there is none here. Name one: make test-colab COLAB_PYTHON=/path/to/python3.13'; \
		exit 1; }
	@$(PYTHON) -m venv --clear $(VENV)
	$(call install,what Colab has,-r constraints-colab.txt pytest-xdist hypothesis)
	@$(BIN)/python tools/colab.py record
