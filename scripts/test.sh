#!/usr/bin/env bash
# Installs into .venv with what development needs, then runs ruff, pyright and pytest.
#
#     bash scripts/test.sh                       # arguments go to pytest: bash scripts/test.sh -k low_rank, ... -m slow
#
# Ends in pytest's own closing line; the status is 0 if everything passed. May be run again at any time.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source scripts/install.sh
install dev
status=0
say "ruff check"
"$venv_python" -m ruff check . || status=1
say "pyright"
PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$venv_python" -m pyright || status=1
say "pytest"
[ "$status" -eq 0 ] || say "(ruff or pyright failed, see above: the status will be 1 whatever pytest says)"
"$venv_python" -m pytest -m "not slow" "$@" || status=$?
exit "$status"
