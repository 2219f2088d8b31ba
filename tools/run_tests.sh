#!/usr/bin/env bash
# The whole test suite in two parts: beside each other, one thread a worker; then, one by one, the tests that measure
# memory or time. Arguments go to both parts.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"

part() { # part MARK ARGUMENT...: no test of this kind among those asked for is no fault
  "$python" -m pytest -m "$1" "${@:2}"
  local status=$?
  [ $status = 5 ] && return 0
  return $status
}

part "not serial" -n "${TEST_WORKERS:-$(nproc)}" --dist worksteal "$@"
first=$?
[ $first = 2 ] && exit 2 # interrupted, or an argument that is none
part serial "$@"
second=$?
[ $first != 0 ] && exit $first
exit $second
