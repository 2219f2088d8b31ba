#!/usr/bin/env bash
# Makes the virtual environment .venv with pinned dependencies and the built extension, for make demo and make test.
# Where the system's Python already has a CUDA build of torch, that one is used and nothing of it is replaced.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-}" # "test" adds what the tests need, "lint" what make lint does

stop() { echo "shipsfast: $1" >&2; exit 2; }

python=""
for candidate in ${PYTHON:-} python3.12 python3.11 python3.13 python3; do
  if "$candidate" -c 'import sys; raise SystemExit(sys.version_info < (3, 11))' 2>/dev/null; then
    python="$candidate"
    break
  fi
done
[ -n "$python" ] || stop "Python 3.11 or newer is needed and was not found: install one, or set PYTHON to its path"
compiler="${CXX:-c++}"
command -v "${compiler%% *}" >/dev/null || stop "a C++ compiler is needed and ${compiler%% *} was not found: install g++ or clang++, or set CXX"

step() { # step NAME COMMAND...: runs it and says how long it took
  local name="$1" start=$SECONDS
  shift
  "$@" || stop "$name failed"
  printf '%-34s %4d s\n' "$name" $((SECONDS - start))
}

cuda=no
"$python" -c 'import torch; raise SystemExit(torch.version.cuda is None)' 2>/dev/null && cuda=yes
stamp=".venv/.made-$cuda"
if [ ! -e "$stamp" ]; then
  rm -rf .venv
  if [ $cuda = yes ]; then
    step "virtual environment (CUDA torch)" "$python" -m venv --system-site-packages .venv
  else
    step "virtual environment" "$python" -m venv .venv
  fi
  touch "$stamp"
fi
pip=".venv/bin/python -m pip --disable-pip-version-check install --quiet"
sources=$(cat setup.py pyproject.toml constraints.txt csrc/* | cksum | cut -d' ' -f1)

if [ ! -e ".venv/.built-$sources" ]; then
  if [ $cuda = no ]; then
    step "torch and build tools" $pip -c constraints.txt torch setuptools wheel ninja
    step "native extension" $pip --no-build-isolation --no-deps -e .
    step "other dependencies" $pip -c constraints.txt --no-build-isolation -e .
  else
    step "native extension" $pip --no-build-isolation --no-deps -e .
    .venv/bin/python -c 'import shipsfast, transformers, pandas, pyarrow, matplotlib, annotated_doc, jinja2, typer, rich, tqdm, psutil, scipy.stats' ||
      step "missing dependencies" $pip --no-build-isolation -e .
  fi
  # In a folder that holds the checkout, its own folder would be taken for the package: an editable install is asked last.
  site=$(.venv/bin/python -c 'import site; print(site.getsitepackages()[0])')
  pwd >"$site/shipsfast-checkout.pth"
  rm -f .venv/.built-*
  touch ".venv/.built-$sources"
fi
if [ "$extras" = test ] && [ ! -e ".venv/.tests-$sources" ]; then
  if [ $cuda = no ]; then
    step "test dependencies" $pip -c constraints.txt pytest pytest-timeout pytest-xdist hypothesis triton accelerate peft torchao bitsandbytes gguf
  else
    .venv/bin/python -c 'import pytest, pytest_timeout, xdist, hypothesis, triton' || step "test dependencies" $pip -c constraints.txt pytest pytest-timeout pytest-xdist hypothesis
  fi
  rm -f .venv/.tests* && touch ".venv/.tests-$sources"
fi
if [ "$extras" = lint ] && [ ! -e .venv/.lint ]; then
  step "lint dependencies" $pip -c constraints.txt ruff import-linter
  touch .venv/.lint
fi
