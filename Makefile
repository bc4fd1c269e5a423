# Every target sets up what it needs by itself: `make demo` and `make test` work in a fresh clone.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
ENGINE := .venv-engine
# Each file of tests in one process: what they share is made once. One process more than CI has cores: many
# tests wait for a disk or another process.
PARALLEL := --numprocesses=3 --dist=loadfile
DEMO := build/tiny-qwen3-w8a8

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-wheel test-ray test-isa test-engine zoo fuzz faults coverage mutants check lint types docs lock pictures format house bench bench-peers bench-arm64 clean

help:           ## show this list
	@grep -E '^[a-z0-9-]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## create the environment in .venv

# The lock has hashes of all but torch, whose build depends on the machine; what is left comes after it.
$(READY): pyproject.toml constraints.txt requirements.lock
	@echo "setting up .venv (a few minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "quantcli needs Python 3.11 or later: make PYTHON=python3.11 ...")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## convert the bundled model and show the result
	@rm -rf $(DEMO) && mkdir -p $(dir $(DEMO))
	@echo '$$ quantcli quantize w8a8_dynamic --model examples/tiny-qwen3 --out $(DEMO)'
	@$(BIN)/quantcli quantize w8a8_dynamic --model examples/tiny-qwen3 --out $(DEMO)
	@echo '$$ quantcli inspect $(DEMO)'
	@$(BIN)/quantcli inspect $(DEMO)
	@echo '$$ quantcli verify $(DEMO) --full --against examples/tiny-qwen3'
	@$(BIN)/quantcli verify $(DEMO) --full --against examples/tiny-qwen3

# `check` needs one core for half a minute, so it runs at the same time as the tests; its output comes last.
test: $(READY)  ## lint, types, tests
	@marks=; command -v chromium >/dev/null || { marks="not browser"; \
		echo "no chromium here: tests marked browser are left out"; }; \
	command -v cc >/dev/null || { marks="$${marks:+$$marks and }not faults"; \
		echo "no cc here: tests marked faults are left out"; }; \
	printed=$$(mktemp); $(MAKE) --no-print-directory check >"$$printed" 2>&1 & check=$$!; \
	failed=0; $(BIN)/python -m pytest $(PARALLEL) -m "$$marks" || failed=$$?; \
	wait $$check || failed=$$?; cat "$$printed"; rm "$$printed"; exit $$failed

# What float sums go into, with the instructions of older CPUs and without the newest ones. Neither can
# add any that the CPU has not. Processes that are killed depend on no sums.
ISA_TESTS := tests/golden tests/e2e/test_calibrate.py tests/e2e/test_static.py \
	-k "not (sigkill or ctrl_c or killed)"

test-isa: $(READY) ## golden and calibration tests with fewer CPU instructions
	@echo "with AVX2:" && \
		ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 $(BIN)/python -m pytest $(PARALLEL) $(ISA_TESTS)
	@echo "with AVX-512 alone:" && \
		ONEDNN_MAX_CPU_ISA=AVX512_CORE $(BIN)/python -m pytest $(PARALLEL) $(ISA_TESTS)

test-wheel: $(READY) ## install the wheel elsewhere; run the commands of README.md, docs/ci.md, Dockerfile
	@$(BIN)/python -m pytest tests/wheel

test-ray: $(READY) ## a Ray cluster of three nodes on this machine, whose processes and nodes are killed
	@$(BIN)/python -m pytest tests/cluster

# The tests pin vLLM to AVX-512 with VNNI: every CPU that has it answers alike (tests/engine/serve.py).
# -rs says why those of AMX were left out.
test-engine: $(READY) $(ENGINE)/ready ## convert, and serve with vLLM on this CPU
	@$(BIN)/python -m pytest $(PARALLEL) -rs tests/engine

$(ENGINE)/ready: constraints-engine.txt
	@echo "setting up $(ENGINE) with vLLM (a few minutes and 2.5 GB the first time)"
	@$(PYTHON) -m venv $(ENGINE)
	@$(ENGINE)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r constraints-engine.txt
	@touch $@

# A process for each core. tests/zoo/expected.txt says what each pair should come to.
zoo: $(READY)   ## convert 210 tiny checkpoints of all families with six recipes each, and verify them
	@$(BIN)/python -m tests.zoo.run
	@$(BIN)/python -m tests.zoo.logits
	@$(BIN)/python -m tests.zoo.roles

faults: $(READY) ## 2,000 errors of system calls and 300 kills, one at a time (needs cc; up to an hour)
	@$(BIN)/python benchmarks/faults.py

MINUTES ?= 10

fuzz: $(READY)  ## malformed input for every reader of untrusted files, MINUTES=10 in all
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check 'atheris>=3' \
		|| echo "atheris does not install here: inputs are changed at random"
	@$(BIN)/python -m tests.fuzz.run --minutes $(MINUTES)
	@$(BIN)/python -m tests.fuzz.test_types
	@$(BIN)/python -m tests.fuzz.checkpoints

# The code that reads untrusted folders and the code that packs: each branch has a test.
COVERED := checkpoint/header.py,checkpoint/checkpoint.py,checkpoint/manifest.py,convert/merge.py,planning/recode.py,planning/repack.py,commands/pack.py
COVERING := $(addprefix tests/unit/checkpoint/test_,header.py checkpoint.py folder.py manifest.py remote.py) \
	$(addprefix tests/unit/planning/test_,recode.py repack.py) tests/unit/commands/test_pack.py \
	tests/e2e/test_pack.py tests/e2e/test_parts.py

coverage: $(READY) ## branches of the code that reads folders and packs: all of them are tested
	@$(BIN)/python -m coverage erase
	@$(BIN)/python -m coverage run --branch -m pytest $(COVERING)
	@$(BIN)/python -m coverage report --show-missing --fail-under=100 \
		--include="$$(echo $(COVERED) | sed 's|^|src/quantcli/|; s|,|,src/quantcli/|g')"

mutants: $(READY) ## small faults in the code that reads headers, checks names and packs (hours)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check cosmic-ray
	@$(BIN)/python -m tests.fuzz.mutants

check: lint types

lint: $(READY)  ## ruff
	@$(BIN)/ruff check src tests benchmarks docs
	@$(BIN)/ruff format --check --quiet src tests benchmarks docs

types: $(READY) ## mypy, strict
	@$(BIN)/mypy

docs: $(READY)  ## regenerate docs/cli.md and docs/recipe.schema.json
	@$(BIN)/python docs/generate.py

lock: $(READY)  ## requirements.lock and docs/licences.md, after a change of dependencies (needs uv)
	@PATH="$(BIN):$$PATH" $(BIN)/python docs/lock.py

pictures: $(READY) ## make the pictures of README.md again (needs chromium)
	@$(BIN)/python docs/pictures.py

format: $(READY) ## format the code
	@$(BIN)/ruff format --quiet src tests benchmarks docs
	@$(BIN)/ruff check --fix --quiet src tests benchmarks docs

house:          ## figures of the source tree against their bars
	@$(PYTHON) benchmarks/house.py

BENCHMARKS := weight_error int4 startup plan outliers determinism isa memory speed as_run breakdown verify pages \
	packages bitflips kill interrupt live calibration perplexity flatquant gptq budget sources experts cluster release remote trust

bench: $(READY) ## run every benchmark of quantcli alone (about an hour, 10 GB of disk)
	@for script in $(BENCHMARKS); do \
		echo "== $$script" && $(BIN)/python benchmarks/$$script.py || exit 1; done

bench-peers: $(READY) ## convert next to other producers (the first time 4 GB of downloads)
	@$(BIN)/python benchmarks/against_peers.py && $(BIN)/python benchmarks/peers_by_data.py

bench-arm64: $(READY) ## the same bytes on an emulated aarch64 (as root; needs qemu-user-static, debootstrap)
	@$(BIN)/python benchmarks/arm64.py

clean:          ## remove what make has made
	@rm -rf .venv $(ENGINE) build .mypy_cache .ruff_cache .hypothesis src/*.egg-info
