# `make quickstart` and `make test` need python3.11 or newer and nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
# small models: one thread a process is fastest, and results do not depend on the number of cores
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart quickstart-short study study-short figures test test-slow lint types imports cpu-tests test-gpu kill-test fuzz docs clean

quickstart: $(VENV)/.run          ## install, train four methods for a judge that likes long answers, table, figure
	$(BIN)/vrpo study recipes/quickstart --out runs/quickstart

quickstart-short: $(VENV)/.run    ## the same wiring in a few steps, for CI
	rm -rf runs/quickstart-short
	$(BIN)/vrpo study recipes/quickstart --out runs/quickstart-short \
	  --set train.steps=14 --set train.eval_every=7 --set train.eval_prompts=64

study: $(VENV)/.run               ## the README's table: 512 runs, thirteen to fifteen hours on two cores; goes on where it stopped (its figure of these: docs/guides/studies.md)
	$(BIN)/vrpo study recipes/arith_cpu/length_bias.yaml --out runs/length_study
	$(BIN)/vrpo study recipes/minus_cpu --out runs/minus_study
	$(BIN)/vrpo study recipes/arith_cpu/phrase_bias.yaml --out runs/phrase_study
	$(BIN)/vrpo study recipes/arith_cpu/flips.yaml --out runs/flips_study
	$(BIN)/vrpo study recipes/arith_cpu/rates.yaml --out runs/rates_study
	$(BIN)/vrpo study recipes/minus_cpu/flips.yaml --out runs/minus_flips_study
	$(BIN)/python recipes/science_cpu/questions.py data/science
	$(BIN)/vrpo study recipes/science_cpu --out runs/science_study
	$(BIN)/vrpo study recipes/science_cpu/clean.yaml --out runs/science_clean_study
	$(BIN)/vrpo study recipes/arith_cpu/flips_clean.yaml --out runs/clean_study
	$(BIN)/vrpo study recipes/minus_cpu/flips_clean.yaml --out runs/minus_clean_study
	$(BIN)/vrpo study recipes/arith_cpu/flips_clean_denoiser.yaml --out runs/clean_denoiser_study
	$(BIN)/vrpo study recipes/minus_cpu/flips_clean_denoiser.yaml --out runs/minus_clean_denoiser_study
	$(BIN)/vrpo study recipes/science_cpu/clean_denoiser.yaml --out runs/science_clean_denoiser_study
	$(BIN)/vrpo study recipes/arith_cpu/hard_noise.yaml --out runs/hard_noise_study

figures: $(VENV)/.run             ## seconds: figures of several studies, drawn again from the records kept beside the recipes
	$(BIN)/python -m vrpo.study.redraw noise docs/figures/results.png recipes/arith_cpu/length_bias.json \
	  recipes/minus_cpu/expected.json recipes/arith_cpu/phrase_bias.json recipes/arith_cpu/flips.json \
	  recipes/minus_cpu/flips.json recipes/science_cpu/expected.json recipes/arith_cpu/hard_noise.json
	$(BIN)/python -m vrpo.study.redraw noise docs/figures/rates.png recipes/arith_cpu/rates.json recipes/arith_cpu/flips.json \
	  recipes/arith_cpu/flips_clean.json recipes/arith_cpu/flips_clean_denoiser.json

study-short: $(VENV)/.run         ## the same wiring with two seeds in a few steps, for CI
	rm -rf runs/study-short
	$(BIN)/vrpo study recipes/chain_cpu/short.yaml --out runs/study-short \
	  --set train.steps=5 --set train.eval_every=5 --set train.eval_prompts=32 --set train.completions_per_step=64
	test -s runs/study-short/study.html

test: lint types imports cpu-tests quickstart-short study-short   ## everything CI runs

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

imports: $(VENV)/.dev
	$(BIN)/lint-imports

cpu-tests: $(VENV)/.dev           ## on the CPU also where there is a GPU
	CUDA_VISIBLE_DEVICES= $(BIN)/pytest -q -n 2 -m "not gpu and not slow"

test-gpu: $(VENV)/.dev            ## a minute: what only a CUDA device can show
	$(BIN)/pytest -q -s -m gpu tests/gpu

test-slow: $(VENV)/.dev           ## minutes: studies, memory, and SmolLM2 on real rows, if its folder is there
	$(BIN)/pytest -q -m slow

kill-test: $(VENV)/.dev           ## N real runs killed at random points, resumed, compared with the uninterrupted one
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m tests.kill.kill_test --kills $(or $(N),100) --signal mixed

fuzz: $(VENV)/.dev                ## N generated configurations, rows and reward outputs
	CUDA_VISIBLE_DEVICES= VRPO_FUZZ_CASES=$(or $(N),10000) $(BIN)/pytest -q -n 2 --timeout 0 tests/fuzz

docs: $(VENV)/.run                ## regenerate the reference pages from the code
	$(BIN)/python -m vrpo.train.catalogue > docs/metrics.md
	$(BIN)/python -m vrpo.config.describe > docs/config.md

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/pip install --quiet -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build dist src/*.egg-info
