#!/usr/bin/env bash
# compute-sanitizer over the CUDA KL tests and the Triton kernels at small shapes: memcheck, then racecheck.
# Needs a GPU, the CUDA toolkit's compute-sanitizer and the built extension. PYTHON names the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

stop() { echo "shipsfast: $1" >&2; exit 2; }

python="${PYTHON:-python3}"
sanitizer="${SANITIZER:-$(command -v compute-sanitizer || echo /usr/local/cuda/bin/compute-sanitizer)}"
[ -x "$sanitizer" ] || stop "compute-sanitizer was not found: install the CUDA toolkit, or set SANITIZER to its path"
"$python" -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || stop "torch sees no CUDA GPU"
"$python" -m pytest --version >/dev/null 2>&1 || stop "pytest is not installed"

export SHIPSFAST_TEST_GPU=1 PYTHONPATH="$PWD"
export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # an allocation of its own for every tensor: reads past its end are seen
unset TRITON_INTERPRET
limit="${LIMIT_S:-240}" # seconds per tool and set of tests
failed=0

check() { # check TOOL NAME PYTEST_ARGUMENTS...
  local tool="$1" name="$2" log status=0
  shift 2
  log="$(mktemp)"
  timeout "$limit" "$sanitizer" --tool "$tool" --target-processes all --error-exitcode 86 --print-limit 20 \
    "$python" -m pytest -q -x --no-header -p no:cacheprovider -p no:randomly "$@" >"$log" 2>&1 || status=$?
  if [ $status -eq 0 ]; then
    echo "$tool $name: clean, $(grep -oE '[0-9]+ passed' "$log" | tail -1)"
  elif [ $status -eq 124 ]; then
    echo "$tool $name: not finished after $limit s (raise LIMIT_S)"
    failed=1
  else
    echo "$tool $name: exit status $status"
    grep -E '=========|FAILED|ERROR|Error' "$log" | head -20
    failed=1
  fi
  rm -f "$log"
}

for tool in memcheck racecheck; do
  check $tool "CUDA KL" tests/ops/test_kl.py tests/ops/test_kl_calls.py -m gpu -k "cpp-cuda or on_the_gpu"
  check $tool "tree attention" tests/ops/test_tree_attention.py -m gpu -k "not long_packs and bf16"
  check $tool "decode attention" tests/ops/test_decode_kernel.py -m gpu -k "not long_caches and not beyond_32_bits and bf16"
  check $tool "small operations" tests/ops/test_small_ops.py -m gpu -k "bf16"
done
exit $failed
