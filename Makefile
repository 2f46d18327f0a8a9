# Everything runs in .venv, which is made when first needed. Settings, all optional:
#   make run PYTHON=python3.12        the Python to make .venv from
#   make run TORCH_INDEX=<address>    a package index to take torch from (a CPU build, say)
#   make lab LAB_FLAGS=--no-browser   flags for JupyterLab
#   make test JOBS=8                  worker processes
#   make soak MINUTES=60              how long the engine is kept busy
#   make mutants MUTANTS="--module rope"   which of them; `--help` of tools/mutants.py

PYTHON ?= python3 python3.13 python3.12 python3.11
TORCH_INDEX ?=
LAB_FLAGS ?=
JOBS ?= 2
MINUTES ?= 10
MUTANTS ?=

VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
OLDEST := .venv-oldest
GRADERS := .venv-graders
EXTRAS := docs browser batch
PAGES := $(wildcard notebooks/[0-9][0-9]_*.ipynb) $(wildcard notebooks/appendix_*.ipynb)

export PIP_DISABLE_PIP_VERSION_CHECK = 1
# Tests start many processes, each of which would compile the same files again.
unexport PYTHONDONTWRITEBYTECODE
# No worker waits while another has a file of slow tests before it. Pages go as a whole, since the
# cells of one share a kernel, and so do browser tests, since those of one file share a server.
SPREAD := -n $(JOBS) --dist worksteal
BY_FILE := -n $(JOBS) --dist loadfile

.PHONY: help run test test-more test-oldest test-browser test-batch lab edit fresh export notebooks
.PHONY: evaluate student docs clean api soak coverage mutants extras

help:
	@echo "make run        hear the bundled model speak, then execute every page"
	@echo "make lab        open the pages in JupyterLab: copies in lab/, yours to write in"
	@echo "make fresh PAGE=07  bring page 07 of lab/ back as it was at first"
	@echo "make test       linters, types, export check, unit tests, outputs of every page"
	@echo "make test-more  what is slow, and Qwen3's own tokenizer, which npm fetches"
	@echo "make coverage   how many lines and branches of the engine the unit tests run"
	@echo "make soak       MINUTES=10 minutes of traffic in flat memory, then a fault at every call"
	@echo "make docs       build the documentation site in build/docs"
	@echo "make student    copies of the pages with functions left to write, and files for graders"
	@echo "make test-browser  use the widgets in a real browser (Chromium)"
	@echo "make test-batch    run the batch inference example on a local Ray"
	@echo "make test-oldest   unit tests on the lowest versions of constraints-oldest.txt"
	@echo "make api        accept a change of the public API into tests/api.txt"
	@echo "make edit       open the pages themselves, to change the course"
	@echo "make mutants    plant bugs in the engine, and see whether the tests notice them"
	@echo "make export     write the modules of folo_lib from the pages"
	@echo "make notebooks  execute the pages and save their outputs in place"
	@echo "make evaluate   measure the bundled model"
	@echo "make clean      remove build/ and caches; lab/ and what begins with .venv stay"

run: $(READY)
	@$(PY) -m folo_lib "Once upon a time" --temperature 0
	@$(PY) tools/run_pages.py

test test-more test-oldest: export HF_HUB_OFFLINE = 1
test test-more test-oldest: export OMP_NUM_THREADS = 1
test: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) tools/export.py --check
	$(PY) -m pytest -m "not more" $(SPREAD) --durations=20
	$(PY) -m pytest $(BY_FILE) --nbval $(PAGES)

test-more: $(READY)
	$(PY) -m pytest -m more $(SPREAD) --durations=20
	@$(MAKE) --no-print-directory $(GRADERS)/.ready || echo "nbgrader and otter are not tried."
	[ ! -e $(GRADERS)/.ready ] || $(GRADERS)/bin/python -m pytest tests/test_graders.py -m more \
	  -k "nbgrader or otter" -n $(JOBS)

# Apart from `make test`, because tracing makes what is plain Python half as slow again.
coverage: export HF_HUB_OFFLINE = 1
coverage: export OMP_NUM_THREADS = 1
coverage: $(READY)
	$(PY) -m coverage erase
	$(PY) -m coverage run -m pytest -q -m "not more" $(SPREAD)
	$(PY) -m coverage combine --quiet
	$(PY) tools/coverage_report.py

soak: export FOLO_SOAK_MINUTES = $(MINUTES)
soak: export OMP_NUM_THREADS = 1
soak: export HF_HUB_OFFLINE = 1
soak: $(READY)
	$(PY) -m pytest tests/test_soak.py tests/test_faults.py tests/test_schedules.py \
	  tests/test_tensor_parallel.py tests/test_engine.py -m more -n 2 --dist load

test-oldest: $(OLDEST)/.ready
	$(OLDEST)/bin/python -m pytest -m "not more" $(SPREAD)

lab: $(READY)
	$(PY) tools/lab.py -- $(LAB_FLAGS)

edit: $(READY)
	$(PY) tools/lab.py --edit -- $(LAB_FLAGS)

fresh: $(READY)
	$(PY) tools/lab.py --fresh "$(PAGE)"

export: $(READY)
	$(PY) tools/export.py

api: $(READY)
	$(PY) tools/api_snapshot.py --write

notebooks: $(READY)
	$(PY) tools/run_pages.py --save

student: $(READY)
	$(PY) tools/student.py

docs: $(VENV)/.docs
	$(PY) -m sphinx --fail-on-warning --keep-going --quiet docs build/docs
	@echo "Open build/docs/index.html"

# Apart from `make test`, because they need a browser and Ray.
test-browser test-batch: export HF_HUB_OFFLINE = 1
test-browser: $(VENV)/.browser
	$(PY) -m pytest tests/browser $(BY_FILE) --durations=10

test-batch: $(VENV)/.batch
	$(PY) -m pytest tests/batch

mutants: $(READY)
	$(PY) tools/mutants.py --jobs $(JOBS) $(MUTANTS)

evaluate: $(READY)
	cd notebooks && ../$(PY) -m tiny_model.evaluate

clean:
	rm -rf build .coverage* .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find folo_lib notebooks tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes in first and alone: constraints.txt names its exact version, so what follows finds it
# installed and looks for no other build.
$(READY): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install -c constraints.txt $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PY) -m pip install -c constraints.txt -e ".[notebooks,test]"
	@mkdir -p $(VENV)/etc/jupyter && cp tools/jupyter/jupyter_nbconvert_config.py $(VENV)/etc/jupyter
	@touch $@

# The lowest versions beside the Python of .venv, and nothing that only the pages need.
$(OLDEST)/.ready: pyproject.toml constraints-oldest.txt | $(PY)
	$(PY) -m venv --clear $(OLDEST)
	$(OLDEST)/bin/python -m pip install -c constraints-oldest.txt \
	  $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(OLDEST)/bin/python -m pip install -c constraints-oldest.txt -e ".[pages,test]"
	@touch $@

# In an environment of their own, which sees .venv: nbgrader and otter put extensions into JupyterLab.
SITE := -c "import sysconfig; print(sysconfig.get_path('purelib'))"
$(GRADERS)/.ready: $(READY)
	$(PY) -m venv --clear $(GRADERS)
	$(PY) $(SITE) > "$$($(GRADERS)/bin/python $(SITE))/course.pth"
	$(GRADERS)/bin/python -m pip install -c constraints.txt -e ".[graders]"
	@touch $@

# What only one command needs is installed when it is first asked for; `make extras` is for who
# runs them all, since pip takes some ten seconds a time to find out what is there.
$(EXTRAS:%=$(VENV)/.%): $(VENV)/.%: $(READY)
	$(PY) -m pip install -c constraints.txt -e ".[$*]"
	@touch $@

extras: $(READY)
	$(PY) -m pip install -c constraints.txt -e ".[docs,browser,batch]"
	@touch $(EXTRAS:%=$(VENV)/.%)

$(PY):
	@for python in $(PYTHON); do \
	  if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	    echo "Making $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv --clear $(VENV) && exit 0; \
	    rm -rf $(VENV); \
	    echo "$$python could not make a virtual environment (Debian, Ubuntu: install python3-venv)." >&2; \
	    exit 1; \
	  fi; \
	done; \
	echo "Python 3.11 or newer is needed, and none of these is: $(PYTHON)." >&2; \
	echo "Install one, or name it: make run PYTHON=/path/to/python3.12" >&2; \
	exit 1
