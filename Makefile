# make demo · make setup · make check · make test · make vehicle-bundle · make offline-kit
PYTHON ?= python3
# vehicle (which comes along), smollm2, or anything that `python -m export bundle` takes.
MODEL ?= vehicle
CHECKPOINT := $(if $(filter smollm2,$(MODEL)),smollm2-135m-instruct,$(MODEL))
SHIPPED_BUNDLE := bundles/vehicle-gpt2-int8
VEHICLE_BUNDLE := .cache/bundles/vehicle-gpt2-int8
BUNDLE ?= $(if $(filter vehicle,$(MODEL)),$(SHIPPED_BUNDLE),.cache/bundles/$(CHECKPOINT))
VENV := .venv
OLDEST := .venv-oldest
BIN := $(VENV)/bin
# Many tests wait for a daemon or a broker, so more run at a time than there are cores; files stay together.
WORKERS ?= 3
IN_PARALLEL := -n $(WORKERS) --dist loadfile
PIP := $(BIN)/python -m pip --disable-pip-version-check -q

.PHONY: demo setup check test test-oldest vehicle-bundle offline-kit format clean
.DELETE_ON_ERROR:

## demo: a broker, a daemon and some questions, with nothing to prepare by hand
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
	$(BIN)/python -m pytest $(IN_PARALLEL)

## test-oldest: the runtime's own tests on the oldest versions that it allows
test-oldest: $(OLDEST)/.done mosquitto
	$(OLDEST)/bin/python -m pytest -q $(IN_PARALLEL) $(addprefix tests/,bundle cache device domain engine mqtt serving)

$(OLDEST)/.done: pyproject.toml constraints-oldest.txt
	@$(PYTHON) -m venv $(OLDEST)
	@$(OLDEST)/bin/python -m pip --disable-pip-version-check -q install -c constraints-oldest.txt -e '.[cpu,demo]' \
		'pytest>=8' 'pytest-timeout>=2.3' 'pytest-xdist>=3.5' 'hypothesis>=6.100'
	@touch $@

## vehicle-bundle: distil the vehicle pack anew; hours on two cores, but it goes on where it was stopped
vehicle-bundle: $(VEHICLE_BUNDLE)/manifest.json

$(VEHICLE_BUNDLE)/manifest.json: | $(VENV)/.dev-done
	$(BIN)/python -m export distill --pack examples/vehicle --work .cache/vehicle --out $(VEHICLE_BUNDLE) \
		--name vehicle-gpt2-int8 --bundle-version 3 --steps 9000 $(DISTILL_FLAGS)

## offline-kit: an archive for a board without a network: make offline-kit ARCH=aarch64 BUNDLE=folder
ARCH ?= aarch64
offline-kit: setup $(BUNDLE)/manifest.json
	$(BIN)/python -m export kit --arch $(ARCH) --bundle $(BUNDLE) $(KIT_FLAGS)

format: $(VENV)/.dev-done
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(OLDEST) .cache dist build

ifeq ($(filter $(BUNDLE),$(SHIPPED_BUNDLE) $(VEHICLE_BUNDLE)),)
$(BUNDLE)/manifest.json:
	@mkdir -p $(dir $(BUNDLE))
	$(BIN)/python -m export bundle $(CHECKPOINT) --out $(BUNDLE)
endif

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
