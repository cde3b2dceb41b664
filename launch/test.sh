#!/usr/bin/env bash
# Set up like the quick start and run the tests, two files at a time: the quick ones, with `--slow` the slow ones of CI,
# with `--full` all there are, every matrix whole. What measures time runs alone afterwards. Other arguments go to pytest.
set -euo pipefail
source "$(dirname "$0")/setup.sh"
install installed-test requirements-test.txt
run() { .venv/bin/python -m pytest -q -m "$@" || [ $? = 5 ]; }  # 5: none of those asked for is of this kind
case "${1:-}" in
  --slow) shift; run "slow and not full and not timing" -n 2 --dist loadfile --no-loadscope-reorder "$@"; run "slow and not full and timing" "$@" ;;
  --full) shift; run "not timing" -n 2 --dist loadfile "$@"; run "timing" "$@" ;;
  *) run "not slow and not full" -n 2 --dist loadfile "$@" ;;
esac
