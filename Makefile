# Two commands do everything: `make gameday` rehearses the game day on the sandbox, `make test` runs the tests.
# Each sets up what it needs: a virtual environment, Python packages (pinned in constraints.txt) and Debian's
# nftables, iproute2 and prometheus (its binary only: the package itself would start a service on :9090).
# The tests also open the reports in Debian's chromium.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
TOOLS := $(abspath .tools)
UNPACKED := $(TOOLS)/prometheus/usr/bin/prometheus

.PHONY: gameday gameday-all test test-all check oracle setup clean

# An installed Prometheus is used where there is one, else the unpacked binary.
RUN := PATH="$(abspath $(BIN)):$$PATH:$(dir $(UNPACKED))"

# The main job; `make gameday-all` takes about twelve minutes.
gameday: setup
	$(RUN) pytest experiments -m "not thorough"

gameday-all: setup
	$(RUN) pytest experiments

# Most tests wait more than they work, so three at a time, the longest first;
# the end-to-end ones measure, so one at a time.
LONGEST := tests/oracle tests/browser tests/sandbox tests/loadgen
test: check $(TOOLS)/.browser
	$(RUN) pytest $(LONGEST) tests --ignore tests/e2e -n 3 --dist loadfile --no-loadscope-reorder
	$(RUN) pytest tests/e2e -m "not thorough"

# The end-to-end tests that `make test` leaves out as well (about ten minutes more).
test-all: test
	$(RUN) pytest tests/e2e -m thorough

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy gameday faults probes loadgen reports sandbox experiments conftest.py
	$(BIN)/lint-imports

# The sandbox's control plane against transcripts of a real one (about 45 s).
oracle: setup
	$(RUN) scripts/oracle

# Known vulnerabilities of the pinned packages. --strict: a package that could not be looked up is a failure.
audit: setup
	$(BIN)/pip install -q --disable-pip-version-check pip-audit
	$(BIN)/pip-audit -r constraints.txt --no-deps --disable-pip --strict

setup: $(VENV)/.ready $(TOOLS)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "gameday needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV) || { $(SUDO) apt-get install -y -q python3-venv && $(PYTHON) -m venv $(VENV); }
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(TOOLS)/.ready:
	mkdir -p $(TOOLS)
	command -v nft ip dpkg-deb >/dev/null || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -y -q nftables iproute2; }
	test -x $(UNPACKED) || command -v prometheus >/dev/null || scripts/fetch-prometheus $(TOOLS)/prometheus "$(SUDO)"
	touch $@

# Where no browser can be had, the tests that need one are skipped, with the reason.
$(TOOLS)/.browser:
	mkdir -p $(TOOLS)
	command -v chromium >/dev/null || command -v google-chrome >/dev/null \
	  || { $(SUDO) apt-get update -q && $(SUDO) apt-get install -y -q --no-install-recommends chromium fonts-dejavu-core; } \
	  || { echo "no browser could be installed: the tests that need one are skipped"; exit 0; }; touch $@

clean:
	rm -rf $(VENV) $(TOOLS)
