# Sourced by launch/quickstart.sh and tests/run.sh: makes .venv once, with the tested versions, and activates it.
# Stands in the repository's root when done. VIDCLS_VENV names another place; PYTHON another interpreter.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VIDCLS_VENV=${VIDCLS_VENV:-$PWD/.venv}
PYTHON=${PYTHON:-python3}

fingerprint() { cat setup.py constraints.txt | sha256sum | cut -d' ' -f1; }

if [ "$(cat "$VIDCLS_VENV/.vidcls-installed" 2>/dev/null)" != "$(fingerprint)$PWD" ]; then
  "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
    || { echo "error: $PYTHON is older than Python 3.11; set PYTHON to a newer one" >&2; exit 1; }
  echo "== installing into $VIDCLS_VENV (once, a few minutes)"
  "$PYTHON" -m venv "$VIDCLS_VENV"
  pip() { "$VIDCLS_VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
  pip install --quiet --upgrade pip setuptools wheel
  # torch first and by its exact version: another package's open range would fetch a newer build of several gigabytes
  pip install --quiet "$(grep '^torch==' constraints.txt)"
  pip install --quiet --no-build-isolation -c constraints.txt -e '.[remote,serve,test]'
  echo "$(fingerprint)$PWD" >"$VIDCLS_VENV/.vidcls-installed"
fi
# PATH first: DeepSpeed compiles its CPU ops with the first ninja it finds, and another version compiles them again.
export PATH="$VIDCLS_VENV/bin:$PATH"
export TOKENIZERS_PARALLELISM=false
