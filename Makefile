# make demo   the main job on a real checkpoint         make test   the tests
# make lint   ruff and pyright                          make docs   the site, in build/site
# make train-demo   SmolLM2-135M trained on a real task, before and after (minutes on a CPU)
# make study        data/study/smollm2.yaml, as far as it has not been run; then docs/STUDY.md
# make faults       kills, other faults, bad inputs: a table of what was tried and lost (minutes)
# make clean        removes .venv and build
#
# Needs python3 (3.10 or later), make and a package registry. Everything goes into .venv, .cache
# and build. Other choices: make demo MODEL=minilm, make demo MODEL=org/model (a hub id),
# make PYTHON=python3.12 test, make test ARGS="-k estimators".

PYTHON ?= python3
MODEL  ?= smollm2
T      ?= 160
BETA   ?= 2.5
ARGS   ?=

COMMA := ,
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test train-demo study faults lint docs clean
.DELETE_ON_ERROR:

demo: .venv/demo
	@mkdir -p build/demo
	@case "$(MODEL)" in \
	  minilm|smollm2|mpnet) source="$$($(BIN)/python data/checkpoints.py $(MODEL))" || exit 1 ;; \
	  *) source="$(MODEL)" ;; \
	esac; \
	cd build/demo && \
	echo "htsr analyze $$source" && ../../$(BIN)/htsr analyze "$$source" && \
	echo "htsr allocate --T $(T) --beta $(BETA)" && ../../$(BIN)/htsr allocate --T $(T) --beta $(BETA)
	@case "$(MODEL)" in smollm2) \
	  echo "SmolLM2 comes from a 4-bit file: its smallest singular values are noise, its tails hold." ;; \
	esac

test: .venv/test
	@$(BIN)/python data/checkpoints.py minilm >/dev/null
	@$(BIN)/python data/checkpoints.py smollm2 >/dev/null
	$(BIN)/python -m pytest $(ARGS)

faults: .venv/test
	PYTHONPATH=tests $(BIN)/python -m helpers.faults_table $(ARGS)

SMOLLM2 := .cache/smollm2-gguf
LABELS  := --model $(SMOLLM2) --data .cache/tasks/sarcasm/test.jsonl --limit 300
DEMO    := build/train-demo

train-demo: .venv/test
	@$(BIN)/python data/checkpoints.py smollm2 --with-gguf --out $(SMOLLM2) >/dev/null
	@$(BIN)/python data/tasks.py sarcasm >/dev/null
	@rm -rf $(DEMO) && mkdir -p $(DEMO)
	$(BIN)/htsr allocate data/smollm2.metrics.json --T 150 -q -o $(DEMO)/allocation.json
	$(BIN)/htsr evaluate $(LABELS)
	$(BIN)/htsr train $(DEMO)/allocation.json --model $(SMOLLM2) \
	  --data .cache/tasks/sarcasm/train.jsonl --steps 120 -o $(DEMO)/adapter
	$(BIN)/htsr evaluate $(LABELS) --adapter $(DEMO)/adapter

study: .venv/test
	@$(BIN)/python data/checkpoints.py smollm2 --with-gguf --out $(SMOLLM2) >/dev/null
	@$(BIN)/python data/tasks.py sarcasm reviews quartz chain_sum >/dev/null
	$(BIN)/htsr study data/study/smollm2.yaml --into docs/STUDY.md --figure docs/study.png

lint: .venv/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "build/site/index.html"

clean:
	rm -rf .venv build

# One environment; a stamp for each set of extras in it.
.venv/bin/python:
	@echo "creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv

.venv/demo .venv/test: .venv/%: .venv/bin/python pyproject.toml constraints.txt
	@echo "installing htsr_alloc[$*] and its dependencies into .venv"
	@$(PIP) -e ".[$(subst test,test$(COMMA)train,$*)]"
	@touch $@

.venv/lint: .venv/test
	@$(PIP) -e ".[dev]"
	@touch $@

.venv/docs: .venv/test
	@$(PIP) -e ".[docs]"
	@touch $@
