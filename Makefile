# make demo | test | test-gpu | build-cuda | lint | format | wheel
#
# Each makes .venv first, if it is not there or its pins have changed. PY=python3 uses that
# interpreter and what is installed with it instead; PYTHON=python3.12 makes .venv from that one.
PYTHON ?= python3
JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$((n < 8 ? n : 8)))

# Threads that spin while they wait make each other wait: tenfold, on two cores with a busy neighbour.
export OMP_WAIT_POLICY ?= PASSIVE
export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

ifdef PY
ENV :=
else
PY := .venv/bin/python
ENV := .venv/stamp
endif

CSRC = $(shell find csrc -name '*.h' -o -name '*.cu' -o -name '*.cpp')

.PHONY: env demo test test-gpu build-cuda lint format wheel clean
env: $(ENV)

.venv/stamp: pyproject.toml constraints.txt .ci/environment
	.ci/environment $(PYTHON)

demo: $(ENV)
	$(PY) examples/quickstart.py $(ARGS)

test: $(ENV)
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n $(JOBS) $(ARGS)

test-gpu: $(ENV)
	$(PY) -m pytest -q -m gpu $(ARGS)

build-cuda: $(ENV)
	$(PY) build_cuda.py

lint: $(ENV)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) -c 'import clang_format; clang_format.clang_format()' --dry-run -Werror $(CSRC)

format: $(ENV)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(PY) -c 'import clang_format; clang_format.clang_format()' -i $(CSRC)

wheel: $(ENV)
	$(PY) -m build --wheel --no-isolation

clean:
	rm -rf build dist demo_output *.egg-info hf_flash_patch/_C.abi3.so
