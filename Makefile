# Proofstone's commands.  `make check` and `make test` need only git, make and Python 3.11 or 3.12 with pip and venv.
# PYTHON=/path/to/python chooses the interpreter; ARGS="..." is handed to pytest or to the paper checks.

# Compilation is single-threaded: two workers, a file each, so that what a file's tests share is computed once.
WORKERS = -n 2 --dist loadfile

help:
	@echo "make check    build .venv if needed, run the paper checks at the quick budget, write reports/report.html"
	@echo "make test     build .venv if needed, run the unit tests but the slow ones, and the quick paper checks"
	@echo "make test-all the same with the slow tests"
	@echo "make lint     ruff: lint and format"
	@echo "make types    mypy on the packages"
	@echo "make lane-b   build .venv-b with the newest jax if needed, run the same tests there"
	@echo "make wheel    build dist/*.whl, install it in an empty environment and import it there"
	@echo "make clean    remove the environments and what builds and tests left (reports stay)"
	@echo 'ARGS="..." adds options, for example: make test ARGS="-k sgd"'

environment:
	@sh tools/environment.sh a

environment-b:
	@sh tools/environment.sh b

check: environment
	.venv/bin/python -m paper_checks run --budget quick $(ARGS)

test: environment
	.venv/bin/python -m pytest tests paper_checks -q -rs $(WORKERS) $(ARGS)

test-all: environment
	.venv/bin/python -m pytest tests paper_checks -q -rs -m "" $(WORKERS) $(ARGS)

lint: environment
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .

types: environment
	.venv/bin/python -m mypy

lane-b: environment-b
	.venv-b/bin/python -m pytest tests paper_checks -q -rs $(WORKERS) $(ARGS)

wheel: environment
	rm -rf build dist
	.venv/bin/python -m build --no-isolation --wheel --outdir dist .
	.venv/bin/python tools/check_wheel.py dist/*.whl

clean:
	rm -rf .venv .venv-b build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.PHONY: help environment environment-b check test test-all lint types lane-b wheel clean
