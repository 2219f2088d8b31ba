#!/usr/bin/env bash
# The whole test suite in two parts: beside each other, one thread a worker; then, one by one, the tests that measure
# time or their own memory. Arguments go to both parts. Fails if a test of either part does, or if no test was asked for.
set -uo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-.venv/bin/python}"
workers="${TEST_WORKERS:-$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)}"
[ "$workers" -le 8 ] || workers=8 # each takes about 1 GB
export PYTHONDONTWRITEBYTECODE= # many processes start: what one compiled, the next need not
NONE=5                            # pytest's status where no test was chosen, which may be so for one part

TEST_PART=parallel "$python" -m pytest -n "$workers" --dist worksteal "$@"
first=$?
[ $first -le 1 ] || [ $first = $NONE ] || exit $first # interrupted, or an argument that is none
TEST_PART=serial "$python" -m pytest "$@"
second=$?
[ $first != $NONE ] || exit $second
[ $first = 0 ] && [ $second != $NONE ] && exit $second
exit $first
