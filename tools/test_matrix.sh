#!/usr/bin/env bash
# The tests at both ends of the supported range: transformers $OLDEST and $NEWEST, each in an environment of its own
# under .matrix/, with the extension built there. Prints a table. What is run: CORE, or what PYTEST_ARGS says ("tests" for all).
#   TORCH=2.11.0   another torch than constraints.txt has; on Linux the index's is a CUDA build of several GB
set -uo pipefail
cd "$(dirname "$0")/.."
OLDEST="${OLDEST:-5.13.1}"
NEWEST="${NEWEST:-$(sed -n 's/^transformers==//p' constraints.txt)}"
TORCH="${TORCH:-$(sed -n 's/^torch==//p' constraints.txt)}"
CORE="tests/engine/test_exactness.py tests/models/test_families.py tests/models/test_refusals.py tests/ops/test_sinks.py
      tests/models/test_wrapped_models.py tests/models/test_quantised.py tests/models/test_streaming.py
      tests/models/test_layer_bytes.py tests/models/test_model_untouched.py tests/engine/test_fused.py
      tests/engine/test_fused_triton.py tests/ops/test_small_ops.py tests/runs/test_runs.py"
PYTEST_ARGS="${PYTEST_ARGS:-$CORE}"
python="${PYTHON:-python3.11}"
command -v "$python" >/dev/null || python=python3
failed=0
rows=()

for version in "$OLDEST" "$NEWEST"; do
  place=".matrix/transformers-$version-torch-$TORCH"
  mkdir -p "$place"
  log="$PWD/$place/log"
  echo "== transformers $version, torch $TORCH (log: $place/log)"
  {
    # What transformers and torch ask for in a certain version is left to the resolver.
    own='/^transformers==/d;/^tokenizers==/d;/^huggingface_hub==/d;/^torch==/d'
    # The interpreter of triton before 3.7 takes arrays of one number for numbers, which numpy 2.4 refuses.
    grep -qx "torch==$TORCH" constraints.txt ||
      own="$own;/^triton==/d;/^setuptools==/d;/^torchao==/d;s/^numpy==.*/numpy<2.4/"
    sed -e "$own" constraints.txt >"$place/constraints.txt"
    printf 'transformers==%s\ntorch==%s\n' "$version" "$TORCH" >>"$place/constraints.txt"
    [ -e "$place/venv/bin/python" ] || "$python" -m venv "$place/venv"
    pip="$place/venv/bin/python -m pip --disable-pip-version-check install --quiet -c $place/constraints.txt"
    $pip torch setuptools wheel ninja &&
      $pip transformers numpy pandas pyarrow matplotlib typer rich safetensors scipy psutil tqdm \
        pytest pytest-timeout hypothesis triton accelerate gguf peft torchao bitsandbytes &&
      mkdir -p "$place/source" && rm -rf "$place"/source/{shipsfast,kernels,benchmarks,csrc,tests} && git ls-files -z --cached --others --exclude-standard |
      tar --null --files-from=- --create --ignore-failed-read | tar --extract --directory="$place/source" &&
      (cd "$place/source" && ../venv/bin/python setup.py --quiet build_ext --inplace)
  } >"$log" 2>&1
  if [ $? -ne 0 ]; then
    rows+=("$version|$TORCH|could not be set up: see $place/log")
    failed=1
    continue
  fi
  # shellcheck disable=SC2086
  if (cd "$place/source" && PYTHONPATH=. OMP_NUM_THREADS=1 ../venv/bin/python -m pytest -q -p no:cacheprovider $PYTEST_ARGS) >>"$log" 2>&1; then
    verdict=passed
  else
    verdict=FAILED failed=1
  fi
  rows+=("$version|$TORCH|$verdict: $(tail -1 "$log" | tr -d '=')")
done

printf '\n%-14s %-10s %s\n' transformers torch result
for row in "${rows[@]}"; do
  IFS='|' read -r version torch result <<<"$row"
  printf '%-14s %-10s %s\n' "$version" "$torch" "$result"
done
exit $failed
