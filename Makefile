# Everything a new machine needs: `make demo` and `make test` each make .venv by themselves; a second call installs nothing.
# The newest Python of the range that this machine has. 3.13 comes last: Megatron-Core asks for a numpy that has no wheel for it.
PYTHON ?= $(shell for v in 3.12 3.11 3.13; do command -v python$$v >/dev/null && python$$v -c '' 2>/dev/null && echo python$$v && break; done)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
EXTRAS := nemo eval instruct curate dev
# What torch brings for CUDA is left to torch, so that each machine gets the build that it can run.
TORCH_CUDA := cuda-toolkit nvidia-cublas nvidia-cuda-cupti nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cudnn-cu13 \
  nvidia-cufft nvidia-cufile nvidia-curand nvidia-cusolver nvidia-cusparse nvidia-cusparselt-cu13 nvidia-nccl-cu13 \
  nvidia-nvjitlink nvidia-nvshmem-cu13 nvidia-nvtx triton

.PHONY: install demo docs test test-all test-hosts gpu-kit mutants mutants-changed lint lock clean
install: $(INSTALLED)

# torch goes first, by version, with pip: pip takes the build that this machine is set up for, and uv then leaves it alone.
$(INSTALLED): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python of 3.11 to 3.13 is here: install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(shell grep -E '^(torch|uv)==' requirements.lock)
	$(BIN)/uv pip install --compile-bytecode --python $(BIN)/python --requirement requirements.lock
	$(BIN)/uv pip install --python $(BIN)/python --no-deps --editable .
	touch $@

lock: $(INSTALLED)
	$(BIN)/uv pip compile pyproject.toml --universal --python-version 3.11 --no-annotate --no-header --upgrade \
	  $(EXTRAS:%=--extra %) $(TORCH_CUDA:%=--no-emit-package %) --output-file requirements.lock

# One thread a test process, as many processes as cores. Default tests; `make test-all` adds the slow ones.
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile -m "not gpu"

# The tests that touch the host, on each NeMo of the range, in environments of their own beside .venv; docs/hosts.md is the table.
# HOSTS=2.4=PATH takes an environment that is there.
test-hosts: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python tests/hosts.py $(HOSTS)

# Faults planted one at a time in the whole package, each against the tests that run its function; goes on where it was stopped.
# `tests/mutation/collect.py tests/mutation/map.json.gz` makes the map of the tests anew.
mutants: $(INSTALLED)
	$(BIN)/python tests/mutation/run.py --number 400 --journal build/mutants.jsonl --report docs/mutants.md

# The same for the files that differ from REF: a sample of 40, for four minutes at most; under 85 % caught in cores it fails.
REF ?= HEAD~1
mutants-changed: $(INSTALLED)
	$(BIN)/python tests/mutation/run.py --changed $(REF) --number 40 --minutes 4 --floor 0.85

# What a machine with a GPU and no network lacks, in build/gpu-kit: pure-Python wheels, the package and benchmarks/gpu.py.
gpu-kit: $(INSTALLED)
	$(BIN)/python benchmarks/gpu_kit.py

# DATA=path trains it on your own text instead of installed sources.
demo: $(INSTALLED)
	$(BIN)/python examples/demo.py $(if $(DATA),--data "$(DATA)")

# The site in build/site; settings and commands are written anew from the schema and the command line.
docs: $(INSTALLED)
	$(BIN)/python docs/make_reference.py
	$(BIN)/mkdocs build

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) runs build dist *.egg-info
