#!/usr/bin/env bash
# The tests: `bash tests/run.sh`; `bash tests/run.sh fast` are those that start no launcher, for the inner loop;
# `bash tests/run.sh all` has the long ones too, for what shorter tests show of a close relative.
# More arguments go to pytest: `bash tests/run.sh fast -k order`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/setup_env.sh"
check=true
case "${1:-}" in
  fast) shift && select=(-m "not launch") check=false ;;
  all) shift && select=() ;;
  *) select=(-m "not long") ;;
esac
if [ "$check" = true ]; then
  ruff check .
  ruff format --check .
  mypy
  # Compiled here, once and without a time limit, rather than inside the first test that trains.
  python -c 'from vidcls.ops import load_op; [load_op(name) for name in ("ShareMemCommBuilder", "FusedAdamBuilder")]' \
    || echo "DeepSpeed's ops cannot be compiled here; the tests go on with torch's fused AdamW"
fi
exec python -m pytest "${select[@]}" "$@"
