#!/usr/bin/env bash
# What follows benchmarks/first_light.sh, which says all about it.
exec "$(dirname "$0")/first_light.sh" --second "$@"
