# `make demo` and `make test` need a Python 3.11 and make, nothing else: they build .venv, install, fetch the weights.
# PYTHON=/path/to/python3.11 picks the Python that .venv is made from; ARGS="..." is handed to the command that is run.

PYTHON ?=
ARGS ?=
VENV := .venv
# In GB, checked before .venv is made. CPU build of torch: 3.3 stay, the rest is room for pip's downloads and the weights.
NEED_GB := 5

# Two threads, so that figures compare between machines; nothing calls home. `make demo HF_HUB_OFFLINE=0` opens the Hub.
export OMP_NUM_THREADS ?= 2
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Waiting threads sleep: spinning ones slow a busy two-core machine tenfold and gain nothing measurable on a quiet one.
export OMP_WAIT_POLICY ?= passive

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow assets kernels kernels-aot lint format notebooks clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

demo: assets  ## answer from a long real document, dense beside sparse (ARGS="--plot blocks.png")
	$(VENV)/bin/minicpm4 demo $(ARGS)

test: assets  ## the whole suite (ARGS="tests/model -k cache")
	$(VENV)/bin/python -m pytest $(ARGS)
ifeq ($(strip $(ARGS)),)
	$(VENV)/bin/python -m pytest hub_kernels/infllm_v2/tests
endif

test-slow: assets  ## proofs that take many minutes, such as a learning run over seeds
	$(VENV)/bin/python -m pytest -m slow $(ARGS)

assets: $(VENV)/.installed  ## fetch and convert the SmolLM2-135M-Instruct weights, once
	@echo "make: looking for the weights (a few seconds)"
	@$(VENV)/bin/python -m transformers_minicpm4.cli.assets

kernels: $(VENV)/.installed  ## assemble hub_kernels/infllm_v2/build, what LOCAL_KERNELS points to and the Hub gets
	@$(VENV)/bin/python hub_kernels/infllm_v2/scripts/build.py

kernels-aot: $(VENV)/.installed  ## compile the Triton kernels for GPUs that are not here (minutes; ARGS="--targets sm_90")
	$(VENV)/bin/python hub_kernels/infllm_v2/scripts/aot.py $(ARGS)

lint: $(VENV)/.installed  ## ruff: rules and format
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

format: $(VENV)/.installed  ## ruff: repair what lint finds
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

notebooks: assets  ## render notebooks/*.py to .ipynb and run them
	$(VENV)/bin/jupytext --update --to ipynb notebooks/*.py
	$(VENV)/bin/jupyter execute --inplace notebooks/*.ipynb

clean:  ## remove builds and tool caches; .venv and the weights stay
	rm -rf build dist hub_kernels/*/build src/*.egg-info .pytest_cache .ruff_cache
	find src tests examples notebooks benchmarks hub_kernels -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

# The stamp comes last, and .installing stands in .venv while an install is under way: where it is found, the last
# install was cut off at an unknown place, and .venv is emptied rather than trusted (pip still has the downloads).
$(VENV)/.installed: setup.cfg constraints.txt
	@set -e; trap 'exit 130' INT TERM HUP; venv='$(VENV)'; mark="$$venv/.installing"; fresh=yes; \
	fail() { echo "make: $$1" >&2; exit 1; }; \
	usable() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
	if [ -e "$$mark" ]; then \
	  echo "make: the last install into $$venv did not finish; building it again"; \
	elif usable "$$venv/bin/python" && { "$$venv/bin/python" -m pip --version || "$$venv/bin/python" -m ensurepip --default-pip; } >/dev/null 2>&1; then \
	  fresh=no; \
	elif [ -e "$$venv" ]; then \
	  echo "make: $$venv has no Python 3.11 or newer that runs; building it again"; \
	fi; \
	if [ $$fresh = yes ]; then \
	  python='$(PYTHON)'; \
	  if [ -n "$$python" ]; then \
	    usable "$$python" || fail "PYTHON=$$python is not a Python 3.11 or newer that runs; install one, or name one that is there: make PYTHON=/path/to/python3.11"; \
	  else \
	    for name in python3.11 python3 python; do if usable $$name; then python=$$name; break; fi; done; \
	    [ -n "$$python" ] || fail "no Python 3.11 or newer found as python3.11, python3 or python; install one, or name one that is there: make PYTHON=/path/to/python3.11"; \
	  fi; \
	  "$$python" -c 'import venv, ensurepip' >/dev/null 2>&1 || \
	    fail "$$python has no venv module; install it (Debian and Ubuntu: apt-get install python3-venv), or name another Python: make PYTHON=/path/to/python3.11"; \
	  free=$$(df -Pk . | awk 'NR == 2 {print int($$4 / 1048576)}'); \
	  [ "$${free:-$(NEED_GB)}" -ge $(NEED_GB) ] || \
	    fail "$$free GB are free in $$PWD and $$venv needs about $(NEED_GB) GB; free some space, or work in a folder on a larger disk"; \
	  echo "make: creating $$venv with $$python (about 10 s)"; \
	  mkdir -p "$$venv"; touch "$$mark"; \
	  find "$$venv" -mindepth 1 -not -path "$$mark" -delete; \
	  "$$python" -m venv "$$venv" || fail "$$python -m venv $$venv failed, its message is above; repair that Python, or name another one: make PYTHON=/path/to/python3.11"; \
	fi; \
	touch "$$mark"; \
	echo "make: installing (about 2 minutes with a fast line; pip is silent for a minute after 'Installing collected packages')"; \
	if ! "$$venv/bin/python" -m pip install --disable-pip-version-check -c constraints.txt -e '.[all]'; then \
	  [ $$fresh = yes ] || rm -f "$$mark"; \
	  fail "pip could not install the project, its message is above; put right what it names (most often the network or the disk) and run make again"; \
	fi; \
	touch "$$mark"; mv "$$mark" $@; \
	echo "make: installed"
