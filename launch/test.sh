#!/usr/bin/env bash
# Set up like the quick start and run the tests, two files at a time. `--slow` runs the slow ones (they take minutes);
# other arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
which=(-m "not slow")
if [ "${1:-}" = --slow ]; then which=(-m slow); shift; fi
exec .venv/bin/python -m pytest -q -n 2 --dist loadfile "${which[@]}" "$@"
