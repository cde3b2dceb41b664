# Sourced by the other scripts: goes to the top of the checkout and makes .venv with what requirements.txt pins.
# Needs Python 3.11 or newer with venv; PYTHON names another interpreter.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-$(command -v python3.11 || command -v python3 || true)}
if [ -z "$python" ] || ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "setup: Python 3.11 or newer is needed (found: ${python:-none}); name one with PYTHON=/path/to/python" >&2
  exit 2
fi
install() { # MARKER FILE: what the file pins, once for each state of it
  local wanted
  wanted=$(cat "$2" pyproject.toml | "$python" -c 'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest())')
  if [ "$(cat ".venv/$1" 2>/dev/null)" = "$wanted" ]; then return; fi
  echo "setup: installing $2 into .venv (a few minutes, once)"
  [ -x .venv/bin/python ] || "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$2"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
  echo "$wanted" > ".venv/$1"
}
install installed requirements.txt
