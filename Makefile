# Every target does its own set-up. `make help` lists them.

PYTHON ?= python3
# transformers, as it is supported and as the record of kinds has it (tests/data/kinds.json). `make test` takes the one of the constraints.
OLDEST := 5.17.0
NEWEST := 5.24.0

# What an environment has beside moepatch: extras of setup.cfg.
EXTRAS := test

# What the kernels are compiled with: the version that belongs to the oldest torch that is supported.
TRITON := 3.6.0

# torch's own cuDNN comes first: Transformer Engine would load the system's, for torch too, and an older one is wrong in a CUDA graph.
CUDNN = $(shell $(PYTHON) -c 'import nvidia.cudnn as found; print(found.__path__[0])' 2>/dev/null)
GPU_NEEDS := torch transformers safetensors rich typer packaging pytest xdist pytest_timeout hypothesis peft accelerate matplotlib

# Where there is no GPU, torch is pinned to the version of the constraints; where there is one, pip's own choice has CUDA.
GPU := $(shell command -v nvidia-smi 2>/dev/null)

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
# Threads that spin while they wait make a busy machine several times slower than it has to be.
export OMP_WAIT_POLICY := passive
# Tests start many Python processes, and none should have to compile what another has.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test test-frameworks test-oldest test-newest soak test-gpu kernels clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*##  *\(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

demo: .venv/stamp  ## fine-tune a small mixture of experts on the CPU, from checkpoint to checkpoint
	.venv/bin/python examples/finetune.py

test: .venv/stamp  ## run the tests
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadgroup

test-frameworks: .venv-frameworks/stamp  ## run the tests that need other frameworks (DeepSpeed, TRL, bitsandbytes, torchao), with these installed
	OMP_NUM_THREADS=1 .venv-frameworks/bin/python -m pytest -n 2 tests/frameworks

test-oldest: .venv-oldest/stamp  ## run the tests with the oldest transformers that is supported
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n 2 --dist loadgroup

test-newest: .venv-newest/stamp  ## run the tests with the newest transformers that they know
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -n 2 --dist loadgroup

soak: .venv/stamp  ## run the tests that ask of every kind what `make test` asks of some
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadgroup -m soak

test-gpu:  ## run the tests that need a GPU, with the machine's own Python: it has the torch and the backends to try
	@$(PYTHON) -c 'import sys; from importlib.util import find_spec; lost = [m for m in "$(GPU_NEEDS)".split() if not find_spec(m)]; \
	lost and sys.exit("$(PYTHON) lacks " + ", ".join(lost) + ": install them, or name another: make test-gpu PYTHON=…")'
	@$(PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit("$(PYTHON) has a torch that sees no CUDA GPU")'
	CUDNN_HOME="$(CUDNN)" LD_LIBRARY_PATH="$(CUDNN:%=%/lib)$${LD_LIBRARY_PATH:+:$$LD_LIBRARY_PATH}" OMP_NUM_THREADS=1 $(PYTHON) -m pytest -m "gpu and not timing" -n 8

kernels: .venv-triton/triton  ## compile the Triton kernels for every known GPU, without one: docs/gpus.md, and its test (some three thousand kernels, 4 s of a core each)
	OMP_NUM_THREADS=1 .venv-triton/bin/python bench/kernel_requirements.py
	OMP_NUM_THREADS=1 .venv-triton/bin/python -m pytest tests/test_gpus.py

# Compiling needs no GPU, but Triton, which torch for the CPU comes without.
.venv-triton/triton: .venv-triton/stamp Makefile
	.venv-triton/bin/python -m pip install -q triton==$(TRITON)
	touch $@

clean:  ## remove the environments and everything generated
	rm -rf .venv .venv-frameworks .venv-oldest .venv-newest .venv-triton build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv-oldest/stamp: REPLACE := s/^transformers==.*/transformers==$(OLDEST)/
.venv-newest/stamp: REPLACE := s/^transformers==.*/transformers==$(NEWEST)/

.venv-frameworks/stamp: EXTRAS := test,frameworks

# An environment that is made once, and brought up to date when the requirements change. torch goes first and alone: a bare `torch`
# would fetch gigabytes of CUDA libraries where nothing can use them.
%/stamp: setup.cfg pyproject.toml tests/constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("moepatch needs Python 3.10 or newer: make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $*
	sed -e '$(REPLACE)' $(if $(GPU),-e '/^torch==/d') tests/constraints.txt > $*/constraints.txt
	$*/bin/python -m pip install -q -c $*/constraints.txt torch
	$*/bin/python -m pip install -q -c $*/constraints.txt -e '.[$(EXTRAS)]'
	touch $@
