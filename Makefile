# Each target is one job. `make install` once, then `make check test` before every commit.
PYTHON ?= python3
CONSTRAINTS = -c constraints.txt

.PHONY: install check format test test-gpu test-full test-transformers bench docs

install:  ## an editable install with everything the tests need, in the active environment
	$(PYTHON) -m pip install $(CONSTRAINTS) -e ".[test,test-clients]"

check:  ## lint, format, types, layers: what CI runs beside the tests
	$(PYTHON) -m ruff check src tests benchmarks examples
	$(PYTHON) -m ruff format --check src tests benchmarks examples
	$(PYTHON) -m mypy
	lint-imports

format:  ## what `check` can repair by itself
	$(PYTHON) -m ruff check --fix src tests benchmarks examples
	$(PYTHON) -m ruff format src tests benchmarks examples

test:  ## without the slow ones, a process a core
	$(PYTHON) -m pytest -n logical --dist worksteal

test-full:  ## all of them, which needs the extra test-clients too
	$(PYTHON) -m pytest -m "slow or not slow"

TRANSFORMERS ?= 4.56.2
test-transformers:  ## what optimize makes of the models of another transformers, which is not installed
	beside=$$(mktemp -d) && $(PYTHON) -m pip install -q --no-deps --target "$$beside" \
		transformers==$(TRANSFORMERS) "tokenizers>=0.22,<0.23" "huggingface_hub>=0.34,<1.0" && \
	PYTHONPATH="$$beside:$$PYTHONPATH" $(PYTHON) -m pytest tests/fusion/test_models.py

# The folders that hold GPU tests, by name: the others import packages that such a machine need not have (gguf).
# Most of the time goes into compiling kernels, a core each: with pytest-xdist 64 s on 16 cores, without 270 s.
# (pytest-benchmark, where it is installed, warns that it does not run beside xdist, and a warning is an error.)
WORKERS ?= 12
test-gpu:  ## on a machine with a CUDA device, with its own python3: nothing is installed
	export PYTHONPATH="src:$$PYTHONPATH"; \
	$(PYTHON) -c "import xdist" 2>/dev/null && parallel="-n $(WORKERS) --dist worksteal -p no:benchmark"; \
	$(PYTHON) -m pytest -m gpu $$parallel tests/benchmark tests/encoders/test_encoder_gpu.py tests/fusion tests/kernels tests/layers tests/models tests/oracle tests/parallel tests/sampling tests/e2e/test_default_model_gpu.py

bench:  ## beside transformers, in one run: table, JSON and plot in benchmarks/results
	$(PYTHON) benchmarks/cpu_vs_transformers.py

docs:  ## every link and every path that the documents name exists
	$(PYTHON) -m pytest -q tests/house/test_docs.py
