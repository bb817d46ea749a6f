# On a fresh machine, run `make demo` or `make test`: both set up first.
DEFAULT_PYTHON := python3.11
PYTHON ?= $(DEFAULT_PYTHON)
# `make test PYTHON=python3.13` uses .venv-3.13 and leaves .venv as it is.
VENV := .venv$(if $(filter-out $(DEFAULT_PYTHON),$(PYTHON)),-$(patsubst python%,%,$(notdir $(PYTHON))))
UV := $(VENV)/bin/uv
RUN := $(VENV)/bin

.PHONY: setup demo test snapshot check format docs bench bench-peers bench-pictures bench-ray bench-scale chaos chaos-cluster fidelity fuzz test-cluster test-vm clean

setup: $(VENV)/.ready

# On PATH, where it may be a pyenv shim that runs nothing, or among pyenv's versions.
FIND_PYTHON = for python in $(PYTHON) "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/*/bin/$(notdir $(PYTHON)); do \
	"$$python" -c "" 2> /dev/null && found=1 && break; \
	done; test -n "$$found" || { echo "$(PYTHON) is neither on PATH nor among pyenv's versions: install it" >&2; exit 1; }

# System packages that the tests need: libfaketime sets an operator's clock, PostgreSQL's server is a store,
# systemd checks the unit, curl is a client, openssl makes certificates, strace records and delays an operator's
# system calls.
PACKAGES := $(if $(wildcard /usr/lib/*/faketime/libfaketimeMT.so.1),,faketime) \
	$(if $(wildcard /usr/lib/postgresql/*/bin/initdb),,postgresql) \
	$(if $(shell command -v systemd-analyze),,systemd) \
	$(if $(shell command -v curl),,curl) \
	$(if $(shell command -v openssl),,openssl) \
	$(if $(shell command -v strace),,strace)
SUDO := $(if $(filter 0,$(shell id -u)),,sudo -n)

$(VENV)/.packages: | $(VENV)/.ready
	$(if $(strip $(PACKAGES)),$(SUDO) apt-get -q -q update && $(SUDO) apt-get -q -q install -y --no-install-recommends $(PACKAGES))
	touch $@

$(VENV)/.ready: pyproject.toml uv.lock
	@test -x $(UV) || { $(FIND_PYTHON) && "$$python" -m venv $(VENV) && $(VENV)/bin/pip install -q --disable-pip-version-check uv; }
	UV_PROJECT_ENVIRONMENT=$(VENV) $(UV) sync -q --frozen --compile-bytecode
	touch $@

demo: setup
	PATH="$(CURDIR)/$(RUN):$$PATH" sh examples/demo.sh

# With this variable set, each test process would compile all tests again.
unexport PYTHONDONTWRITEBYTECODE

# On two cores, Ray's processes exceed their own time limits beside other tests.
test: setup $(VENV)/.packages
	$(RUN)/pytest -n 4 -m "not ray and not fidelity and not cluster"
	$(RUN)/pytest -n 1 -m ray

# The shapes of all answers, after a change that is meant to break clients.
snapshot: setup
	CORTEX_REWRITE_SNAPSHOT=1 $(RUN)/pytest -n 0 tests/contract/test_snapshot.py

check: setup
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

format: setup
	$(RUN)/ruff check --fix .
	$(RUN)/ruff format .

docs: setup
	$(RUN)/python docs/configuration.py
	$(RUN)/python docs/lifecycle.py

bench: setup
	$(RUN)/python benchmarks/run.py

# The peers have an environment of their own: only `make bench-peers` needs its installation.
PEERS := .venv-peers

$(PEERS)/.ready: pyproject.toml uv.lock | $(VENV)/.ready
	command -v redis-server > /dev/null || { $(SUDO) apt-get -q -q update && $(SUDO) apt-get -q -q install -y --no-install-recommends redis-server; }
	UV_PROJECT_ENVIRONMENT=$(PEERS) $(UV) sync -q --frozen --compile-bytecode --only-group peers --only-group bench
	touch $@

bench-peers: setup $(PEERS)/.ready
	$(RUN)/python benchmarks/run.py --peers --out benchmarks/results.json
	$(MAKE) bench-pictures

bench-scale: setup $(VENV)/.packages
	$(RUN)/python benchmarks/scale.py
	$(RUN)/python benchmarks/scale.py --store postgresql

bench-ray: setup $(VENV)/.packages $(PEERS)/.ready
	$(RUN)/python benchmarks/on_ray.py

bench-pictures: setup $(PEERS)/.ready
	$(PEERS)/bin/python benchmarks/plots.py benchmarks/results.json docs/performance
	$(RUN)/python benchmarks/page.py

chaos: setup
	$(RUN)/python tests/chaos/hostile.py
	$(RUN)/python tests/chaos/storm.py
	$(RUN)/python tests/chaos/storm.py --store postgresql --jobs 1000 --kills 400
	$(RUN)/python tests/chaos/storm.py --store postgresql --operators 3 --jobs 1000 --kills 400
	CORTEX_MACHINE_EXAMPLES=2000 $(RUN)/pytest tests/unit/test_machine.py

fuzz: setup
	$(RUN)/python tests/fuzz/fuzz.py

# Widely used libraries, which take minutes to install and seconds to import, have an environment of their own.
FIDELITY := .venv-fidelity

$(FIDELITY)/.ready: pyproject.toml uv.lock | $(VENV)/.ready
	UV_PROJECT_ENVIRONMENT=$(FIDELITY) $(UV) sync -q --frozen --compile-bytecode --only-group fidelity
	touch $@

fidelity: setup $(FIDELITY)/.ready
	CORTEX_FIDELITY_PYTHON=$(CURDIR)/$(FIDELITY)/bin/python $(RUN)/pytest -n 2 tests/fidelity

# Debian's kernel, systemd and cgroup v2, in an emulated machine: about half an hour. It needs root.
$(VENV)/.vm-packages: | $(VENV)/.ready
	command -v qemu-system-x86_64 debootstrap > /dev/null || { $(SUDO) apt-get -q -q update && $(SUDO) apt-get -q -q install -y --no-install-recommends qemu-system-x86 debootstrap e2fsprogs; }
	touch $@

test-vm: setup $(VENV)/.vm-packages
	$(SUDO) $(RUN)/python tests/vm/vm.py

# Clusters whose machines are network namespaces, with Ray's own health settings. They need root.
CLUSTER_PACKAGES := $(if $(shell command -v ip),,iproute2) $(if $(shell command -v nft),,nftables)

$(VENV)/.cluster-packages: | $(VENV)/.packages
	$(if $(strip $(CLUSTER_PACKAGES)),$(SUDO) apt-get -q -q update && $(SUDO) apt-get -q -q install -y --no-install-recommends $(CLUSTER_PACKAGES))
	touch $@

test-cluster: setup $(VENV)/.cluster-packages
	$(SUDO) $(RUN)/pytest -n 0 tests/cluster

chaos-cluster: setup $(VENV)/.cluster-packages
	$(SUDO) $(RUN)/python tests/chaos/cluster_storm.py

clean:
	rm -rf .venv .venv-* .vm
