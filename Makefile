# Everything a newcomer types. Needs Python 3.11 or 3.12, git and make; sets up the rest by itself, once, in .venv and models/.
.DEFAULT_GOAL := help
.PHONY: help venv model quickstart table3 claims test test-all oracle faults kills soak gpu-check lint audit docs

RUN ?= deploy/runs/quickstart.yaml
LOCK ?= cpu
ARGS ?=
STORIES ?= ../shared/models/stories260K
# Two workers: most tests wait for processes to start. Files in their order: the one that kills runs, minutes long, has few tests and would come last.
# PARALLEL= runs them one after the other.
PARALLEL ?= -n 2 --dist loadfile --no-loadscope-reorder
PY := .venv/bin/python

# Nobody is told about your runs, and forked tokenizers do not warn.
export DO_NOT_TRACK := 1
export VLLM_NO_USAGE_STATS := 1
export PREFECT_SERVER_ANALYTICS_ENABLED := false
export MLFLOW_DISABLE_TELEMETRY := true
export TOKENIZERS_PARALLELISM := false

help:  ## this list
	@sed -n 's/^\([a-z0-9-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

venv:  ## the pinned environment, in .venv (LOCK=gpu: with CUDA; PYTHON=...: made with that interpreter)
	@python=$$(deploy/setup/find_python.sh) && "$$python" deploy/setup/setup_venv.py --lock $(LOCK)

model: venv  ## the quickstart's model, in models/smollm2-135m-instruct
	@$(PY) deploy/setup/get_smollm2.py

quickstart: venv model  ## three self-play iterations on the CPU, and how much they improved the model (RUN=another.yaml)
	@$(PY) -m flows run $(RUN)

table3: venv model  ## SWIFT against TIS-DPO (D): seconds of generation, weights and training, as in the paper's Table 3
	@$(PY) -m flows compare deploy/runs/compare/table3.yaml

claims: venv model  ## the papers' claims, tried small: about an hour, docs/evidence.md (ARGS="--only swift"; STORIES=DIR: the story writer)
	@test -e models/stories260K || test ! -d "$(STORIES)" || ln -s "$(abspath $(STORIES))" models/stories260K
	@$(PY) -m benchmarks.claims $(ARGS)

# Tests never ask the hub for anything unless told to (HF_HUB_OFFLINE=0 make test ARGS="-m hub").
test test-all: export HF_HUB_OFFLINE ?= 1
test: venv  ## the test suite, without the slow ones (ARGS="-k name": some of them)
	@$(PY) -m pytest $(PARALLEL) $(ARGS)

test-all: venv model  ## the slow ones too: the real model, and killing a run ten times
	@$(PY) -m pytest -m "not gpu and not hub" $(ARGS)

oracle: venv  ## llm-blender in an environment of its own, for the tests that compare the native PairRM with it
	@tests/oracle/setup.sh

faults: venv  ## 220 faults (kills, full disks, damage, outages), struck one by one; the table of docs/reliability.md (ARGS="--count 20")
	@$(PY) -m benchmarks.faults --count 215 --whole $(ARGS)

kills: venv  ## 60 kills of whole runs of many kinds, compared file by file with undisturbed ones (ARGS="--only swift ranks")
	@$(PY) -m benchmarks.kills $(ARGS)

soak: venv  ## tiny runs for two hours: does anything grow? (ARGS="--minutes 15")
	@$(PY) -m benchmarks.soak $(ARGS)

gpu-check: venv  ## is everything right and fast on this GPU? Eight minutes, gpu_check.json (ARGS=--smoke: on a CPU, tiny)
	@$(PY) -m benchmarks.gpu_check $(ARGS)

audit:  ## pinned versions with known vulnerabilities, and the versions that mend them
	@python=$$(deploy/setup/find_python.sh) && "$$python" deploy/setup/audit.py

docs: venv  ## docs/ as a site, in site/index.html; needs no network
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet && echo "site/index.html"

lint: venv  ## style, import rules, types
	@$(PY) -m ruff check . && .venv/bin/lint-imports --no-cache && .venv/bin/basedpyright
