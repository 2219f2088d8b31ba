# Two commands on a fresh machine: make demo, make test. Python 3.11 to 3.13 and a C++ compiler are all they need.
.PHONY: demo test real wheel test-gpu test-matrix test-sanitizers env bench bench-gpu lint clean

demo: env ## scan the embedded model, write demo-run/
	@.venv/bin/shipsfast demo

test: ## the whole test suite
	@tools/make_env.sh test
	@tools/run_tests.sh $(PYTEST_ARGS)

wheel: ## sdist and wheel, installed into an empty environment and tried there
	@tools/make_env.sh
	@tools/check_wheel.sh

real: ## scans of a real chat model (SmolLM2-135M-Instruct, 93 MB, fetched once) against plain passes
	@tools/make_env.sh test
	@SHIPSFAST_REAL=1 .venv/bin/python -m pytest -m real $(PYTEST_ARGS)

test-gpu: ## the tests that need a CUDA GPU, compiled instead of interpreted
	@tools/make_env.sh test
	@SHIPSFAST_TEST_GPU=1 .venv/bin/python -m pytest -m gpu $(PYTEST_ARGS)

test-sanitizers: ## the C++ sources under AddressSanitizer and UndefinedBehaviorSanitizer
	@tools/make_env.sh test
	@.venv/bin/python tools/sanitizers.py

test-matrix: ## a core of the tests with the oldest and the newest supported transformers
	@tools/test_matrix.sh

env:
	@tools/make_env.sh

bench: ## the CPU benchmark against other ways of doing the same scan
	@tools/make_env.sh
	@.venv/bin/python -m benchmarks cpu

bench-gpu: ## everything that is measured on a CUDA GPU, rows in benchmarks/results (BENCH_ARGS="--quick")
	@tools/make_env.sh test
	@.venv/bin/python -m benchmarks gpu $(BENCH_ARGS)

lint: ## style, and that the arrows between rooms point down
	@tools/make_env.sh lint
	@.venv/bin/python -m ruff check .
	@.venv/bin/python -m ruff format --check .
	@.venv/bin/lint-imports

clean:
	rm -rf .venv build dist *.egg-info shipsfast/*.so
