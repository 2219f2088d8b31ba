#!/usr/bin/env bash
# The first minutes on a GPU, in one command: does it run, is it right, what share of the floor, where does the time go.
#
#   benchmarks/first_light.sh [--smoke] [--second] [--budget-s N] DIR
#
# The extension, a few GPU tests, launch parameters of one kernel, ceilings, a scan of Llama-2-7B's shape beside its peers,
# a profile, and the small kernels, within 300 s. --second (benchmarks/second_light.sh) is what comes next, within 230 s:
# the long template, chunk sizes, attention kernels, generation, a model with grouped keys, precision. Each stage has a limit, and
# none stops the next; what does not fit is not measured.
#
# Everything it writes is in DIR, at most 8 files, but for the extension, which is built where it is imported, and
# compilers' caches in TMPDIR: <device>.jsonl, <device>-profile.txt, first.log or second.log, tests.log, tune.txt, stages.txt,
# environment.txt. The last thing printed is a table of what was measured.
#
# --smoke: small shapes on the CPU, to try this script. PYTHON: the interpreter, python3 by default. SHIPSFAST_COMMIT: the
# commit of a copy without its history.
#
# Exit code: 0 if anything was measured, also if some of it failed (see the table); 3 if nothing was; 2 for a wrong argument,
# a folder that cannot be written, or no Python.
set -uo pipefail

stop() { echo "${0##*/}: $1" >&2; exit 2; }

which=first smoke="" budget="" dir=""
while [ $# -gt 0 ]; do
  case "$1" in
    --second) which=second ;;
    --smoke) smoke=yes ;;
    --budget-s) shift; budget="${1:-}"; [[ "$budget" =~ ^[1-9][0-9]*$ ]] || stop "--budget-s: expected whole seconds" ;;
    -*) stop "unknown option $1: expected [--smoke] [--second] [--budget-s N] DIR" ;;
    *) [ -z "$dir" ] || stop "one folder is expected"; dir="$1" ;;
  esac
  shift
done
[ -n "$dir" ] || stop "a folder for what is written is expected: ${0##*/} DIR"
mkdir -p "$dir" && dir="$(cd "$dir" && pwd)" && touch "$dir/stages.txt" || stop "cannot write into $dir"
cd "$(dirname "$0")/.." || stop "no repository above ${0%/*}"

python="${PYTHON:-python3}"
command -v "$python" >/dev/null || stop "there is no $python: set PYTHON to an interpreter with torch"
if [ $which = first ]; then : "${budget:=300}"; else : "${budget:=230}"; fi
[ -z "$smoke" ] || budget=900 # a slow CPU is no reason to leave anything out
MEASURE_S=145 # that the cases of the last stage need: earlier stages leave it to them
TABLE_S=5

scratch="${TMPDIR:-/tmp}/shipsfast-$(id -u)" # kept for the next command: compiled kernels
mkdir -p -m 700 "$scratch" || stop "cannot write into $scratch"
export PYTHONPATH="$PWD" PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-$scratch/triton}" TORCHINDUCTOR_CACHE_DIR="${TORCHINDUCTOR_CACHE_DIR:-$scratch/inductor}"
export HF_HOME="${HF_HOME:-$scratch/huggingface}" HYPOTHESIS_STORAGE_DIRECTORY="$scratch/hypothesis"
unset TRITON_INTERPRET # set, Triton compiles nothing

environment() { # what a figure may depend on
  date -u +%FT%TZ
  echo "commit ${SHIPSFAST_COMMIT:-$(git rev-parse HEAD 2>/dev/null || echo unknown)}; $(uname -srm); $(nproc) processors"
  "$python" -c 'import importlib.metadata as m, sys; print(sys.version, sys.executable)
for name in sorted({d.metadata["Name"] for d in m.distributions()} & set(
    "torch triton transformers numpy scipy pytest pytest-xdist liger-kernel flash-attn ninja setuptools".split())):
    print(name, m.version(name))'
  nvcc --version
  nvidia-smi
  nvidia-smi -q -d CLOCK,POWER,PERFORMANCE
}

stage() { # stage NAME MOST KEEP COMMAND...: at most MOST seconds, and KEEP are left to later ones; @LIMIT@ in it is that limit
  local name="$1" most="$2" room=$((budget - TABLE_S - SECONDS - $3)) start=$SECONDS code
  [ -n "$smoke" ] && room=$((budget - SECONDS))
  shift 3
  [ "$most" -le "$room" ] || most=$room
  if [ "$most" -lt 10 ]; then
    echo "$name: not run, $((budget - SECONDS)) s of $budget s were left" | tee -a "$dir/stages.txt"
    return
  fi
  echo "== $name, at most $most s"
  # A little before the limit a benchmark begins nothing more; at the limit it is told to end, and says where it stands.
  timeout -k 5 "$most" "${@//@LIMIT@/$((most - 8))}"
  code=$?
  case $code in
    124 | 137) echo "$name: ended after $((SECONDS - start)) s" ;;
    *) echo "$name: $((SECONDS - start)) s, exit code $code" ;;
  esac | tee -a "$dir/stages.txt"
}

gpu=("$python" -m benchmarks gpu --quick --results "$dir" --budget-s @LIMIT@)
[ -z "$smoke" ] || gpu+=(--smoke)

first() {
  stage "build and tests" 178 $MEASURE_S "${gpu[@]}" --case build --case tests
  local sweep=(--kernel tree_attention --dtype bfloat16 --head-dim 128 --tree leaves --budget-s 12)
  [ -z "$smoke" ] || sweep=(--dry-run --kernel decode_attention --dtype bfloat16 --head-dim 64 --limit 1 --jobs 1)
  stage tune 50 $MEASURE_S bash -c '"${@:2}" >"$1" 2>&1' tune "$dir/tune.txt" "$python" -m benchmarks.tune "${sweep[@]}"
  [ ! -f "$dir/tune.txt" ] || tail -n 3 "$dir/tune.txt"
  stage measure "$budget" 0 "${gpu[@]}" --no-build --case ceilings --case llama2-7b-short --case profile --case kernels-kl \
    --case kernels-small-ops
}

second() {
  stage measure "$budget" 0 "${gpu[@]}" --case llama2-7b-template --case chunk-tokens --case kernels-attention \
    --case llama2-7b-generation --case llama31-8b --case head-chunk --case precision
}

everything() {
  environment >>"$dir/environment.txt" 2>&1
  if command -v nvidia-smi >/dev/null; then # what clock and power the figures were taken at
    nvidia-smi --query-gpu=timestamp,clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv -l 2 \
      >>"$dir/environment.txt" 2>/dev/null </dev/null &
    sampler=$!
    trap '{ kill $sampler; wait $sampler; } 2>/dev/null' EXIT
  fi
  $which
  echo "== $which light, $SECONDS s of $budget s"
  timeout -k 2 20 "$python" -m benchmarks gpu-table "$dir"
}

everything 2>&1 | tee -a "$dir/$which.log"
exit "${PIPESTATUS[0]}"
