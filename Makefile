# `make` alone lists the targets. Each sets up what it needs in $(VENV), once.

PYTHON ?= python3
VENV = .venv
# A file for pip's --constraint, for environments of other than the newest versions.
CONSTRAINTS =
PYTEST_ARGS = -n 2
ARGS =
# One of the programs in benchmarks/quality.
EXPERIMENT = pairs

export CONSTRAINTS
# With it every process would compile all that it imports.
unexport PYTHONDONTWRITEBYTECODE
setup = @sh .ci/venv '$(VENV)' '$(PYTHON)'
run = $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help demo demo-nnx demo-train demo-sharded demo-many quickstart bench \
  bench-layer bench-growth bench-many bench-scale bench-torch bench-chips bench-pod \
  bench-quality bench-vllm test test-slow test-exhaustive test-all test-tunix test-gemma \
  test-maxtext test-peft test-vllm test-chips docs lint wheel release clean env tools

help: ## list the targets
	@echo 'Targets:'
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile \
	  | while IFS='|' read -r name text; do printf '  %-17s%s\n' "$$name" "$$text"; done
	@echo 'Variables:'
	@echo '  PYTHON        the interpreter, 3.11 or newer (now: $(PYTHON))'
	@echo '  ARGS          options of the demos, quickstart and benchmarks, as in: make demo ARGS=--help'
	@echo '  EXPERIMENT    what bench-quality runs: recipe, recipe_losses, pairs, bases, loads, facts, pretraining, reasoning, suite, restarts,'
	@echo '                renewals, stored, spectra, one_rate, unscaled_rates, bfloat16, merging'
	@echo '  PYTEST_ARGS   options of the tests, as in: make test PYTEST_ARGS="-k merge"'

demo: env ## teach a language model facts it does not know
	$(run) -m examples.teach_facts $(ARGS)

demo-nnx: env ## the same with the model's twin in Flax NNX
	$(run) -m examples.teach_facts_nnx $(ARGS)

demo-train: env ## a whole run: evaluation, early stop, checkpoints, merge
	$(run) -m examples.train $(ARGS)

demo-sharded: env ## train on a mesh of eight devices, all of them this CPU
	$(run) -m examples.train_sharded --host-devices 8 --data 2 --fsdp 2 --model 2 $(ARGS)

demo-many: env ## one batch of questions, each row with another of the adapters in out/
	$(run) -m examples.evaluate_many $(ARGS)

quickstart: env ## the shortest use of the library
	$(run) -m examples.quickstart $(ARGS)

bench: env ## a training step of two models against the frozen model and LoRA, in turns
	$(run) -m benchmarks.step.train_step $(ARGS)

bench-layer: env ## one layer, both ways to compute it, beside a model of the cost
	$(run) -m benchmarks.layer.one_layer $(ARGS)

bench-many: env ## a different adapter for each row against one, merged copies and LoRAs
	$(run) -m benchmarks.layer.many_adapters $(ARGS)

bench-growth: env ## how an adapter's cost grows with each size of a model
	$(run) -m benchmarks.layer.growth $(ARGS)

bench-scale: env ## models of 8B to 405B on 8 to 256 devices, compiled only
	$(run) -m benchmarks.mesh.scale $(ARGS)

bench-torch: VENV = .venv-torch
bench-torch: ## a training step beside PyTorch's with PEFT, in an environment of its own
	$(setup) torch
	$(run) -m benchmarks.step.torch_step $(ARGS)

bench-chips: VENV = .venv-chips
bench-chips: ## rooflines on TPUs and an H100 by their compilers, in an environment of its own
	$(setup) chips
	$(run) -m benchmarks.chips.compare $(ARGS)

bench-pod: VENV = .venv-chips
bench-pod: ## memory, traffic and rooflines of Llamas up to 405B on 8 to 256 TPUs
	$(setup) chips
	$(run) -m benchmarks.chips.pod $(ARGS)

bench-vllm: VENV = .venv-vllm
bench-vllm: export XLA_FLAGS =
bench-vllm: ## requests a second and memory of adapters in vLLM, in its environment
	$(setup) vllm
	$(run) -m benchmarks.serving.vllm_rates $(ARGS)

bench-quality: ## what is learned and forgotten: EXPERIMENT in benchmarks/quality
	$(setup) quality
	$(run) -m benchmarks.quality.$(EXPERIMENT) $(ARGS)

test: env ## the tests, without the slow ones
	$(run) -m pytest $(PYTEST_ARGS)

test-slow: env ## the slow tests alone
	$(run) -m pytest -m "slow and not exhaustive" $(PYTEST_ARGS)

test-exhaustive: env ## all cases of all laws: what the slow tests leave out
	$(run) -m pytest -m exhaustive $(PYTEST_ARGS)

test-all: env ## all tests
	$(run) -m pytest -m "" $(PYTEST_ARGS)

test-tunix: VENV = .venv-tunix
test-tunix: ## adapters in Tunix and in qwix's models, in an environment of its own
	$(setup) tunix
	$(run) -m pytest tests/with_tunix tests/models/test_interception.py $(PYTEST_ARGS)

test-gemma: VENV = .venv-gemma
test-gemma: ## adapters in gemma, Kauldron and Keras, on Python 3.12 or newer
	$(setup) gemma
	$(run) -m pytest tests/with_gemma

test-maxtext: VENV = .venv-maxtext
test-maxtext: ## adapters in MaxText's own trainer, on Python 3.12 or newer
	$(setup) maxtext
	$(run) -m pytest tests/with_maxtext --durations 25

test-peft: VENV = .venv-torch
test-peft: ## Hugging Face PEFT loads what we export, in an environment with PyTorch
	$(setup) torch
	$(run) -m pytest tests/with_peft

test-vllm: VENV = .venv-vllm
test-vllm: export XLA_FLAGS =
test-vllm: ## vLLM serves adapters that are trained for it, in an environment with vLLM
	$(setup) vllm
	$(run) -m pytest tests/with_vllm --timeout 3600

test-chips: VENV = .venv-chips
test-chips: export XLA_FLAGS =
test-chips: ## adapters compile well for TPUs, in an environment of its own
	$(setup) chips
	$(run) -m pytest tests/on_chips $(PYTEST_ARGS)

docs: VENV = .venv-docs
docs: ## the site, in build/site, in an environment of its own; it runs the notebooks
	$(setup) docs
	JAX_PLATFORMS=cpu $(run) -m sphinx --fail-on-warning --keep-going --quiet \
	  -c docs -d build/doctrees $(ARGS) . build/site
	@echo "open build/site/index.html"

lint: tools ## what must be clean: ruff and pyright
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

wheel: tools ## wheel and source distribution, in dist/
	rm -rf dist
	$(run) -m build

release: tools ## all of a release but the upload, with each Python here and each extra
	bash .ci/release $(run)

clean: ## remove all that make made, the environments too
	rm -rf .venv* build dist out .hypothesis .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

env: # the environment for demo and test
	$(setup)

tools: # the same with ruff, pyright and build
	$(setup) tools
