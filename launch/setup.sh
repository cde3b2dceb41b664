# Sourced by the other scripts: goes to the top of the checkout and makes .venv, once for each state of
# requirements.txt. Needs Python 3.11 or newer with venv; PYTHON names another interpreter.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "setup: Python 3.11 or newer is needed (found: ${python:-none}); name one with PYTHON=/path/to/python" >&2
  exit 2
fi
wanted=$(cat requirements.txt pyproject.toml | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
  echo "setup: installing into .venv (a few minutes, once)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
  echo "$wanted" > .venv/installed
fi
