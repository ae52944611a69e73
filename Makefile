# make demo · make setup · make check · make test
PYTHON ?= python3
MODEL ?= smollm2-135m-instruct
BUNDLE ?= .cache/bundles/$(MODEL)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo setup check test format clean
.DELETE_ON_ERROR:

## demo: a broker, a daemon and six questions, with nothing to prepare by hand
demo: setup $(BUNDLE)/manifest.json
	@$(BIN)/edge-llm demo --bundle $(BUNDLE) $(DEMO_FLAGS)

## setup: the environment that exports, serves and asks (no torch)
setup: $(VENV)/.setup-done

## check: lint, format and types
check: $(VENV)/.dev-done
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

## test: the whole suite, against a real mosquitto
test: $(VENV)/.dev-done mosquitto
	$(BIN)/python -m pytest

format: $(VENV)/.dev-done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .cache dist build

$(BUNDLE)/manifest.json:
	@mkdir -p $(dir $(BUNDLE))
	$(BIN)/python -m export bundle $(MODEL) --out $(BUNDLE)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python 3.10 or newer is needed: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 2; }
	@$(PYTHON) -m venv $(VENV) || \
		{ rm -rf $(VENV); echo "this Python cannot make environments: apt-get install python3-venv"; exit 2; }
	@$(PIP) install --upgrade pip

$(VENV)/.setup-done: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing into $(VENV) ..."
	@$(PIP) install -c constraints.txt -e '.[cpu,demo,export-lite]'
	@touch $@

$(VENV)/.dev-done: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing the development environment into $(VENV) ..."
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.setup-done

.PHONY: mosquitto
mosquitto:
	@PATH="$$PATH:/usr/sbin:/usr/local/sbin"; command -v mosquitto >/dev/null && command -v mosquitto_pub >/dev/null || { \
		if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
			apt-get update -qq && apt-get install -y -qq --no-install-recommends mosquitto mosquitto-clients >/dev/null; \
		else echo "the tests need a broker: sudo apt-get install mosquitto mosquitto-clients"; exit 2; fi; }
