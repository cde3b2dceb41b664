#!/usr/bin/env bash
# Set up like the quick start and run the tests, two files at a time. `--slow` runs the slow ones one after another (they
# take half an hour, and some of them time what they start); other arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
which=(-m "not slow" -n 2 --dist loadfile)
if [ "${1:-}" = --slow ]; then which=(-m slow); shift; fi
exec .venv/bin/python -m pytest -q "${which[@]}" "$@"
