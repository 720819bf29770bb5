#!/usr/bin/env bash
# Installs into .venv with what development needs, then runs ruff, pyright and pytest.
#
#     bash scripts/test.sh                       # arguments go to pytest: bash scripts/test.sh -k low_rank
#
# The slow tests are run by .venv/bin/pytest -m slow. Ends in pytest's own closing line; the status is 0 if everything passed. May be run again at any time.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source scripts/install.sh
install dev
status=0
say "ruff check"
"$venv_python" -m ruff check . || status=1
say "pyright"
PYRIGHT_PYTHON_IGNORE_WARNINGS=1 "$venv_python" -m pyright || status=1
[ "$status" -eq 0 ] || say "(ruff or pyright failed, see above: the status will be 1 whatever pytest says)"
say "pytest: what times something or fills memory, by itself"
"$venv_python" -m pytest -m "alone and not slow" "$@"
code=$?
[ "$code" -eq 0 ] || [ "$code" -eq 5 ] || status=$code # 5: the arguments chose none of these
export OMP_NUM_THREADS=1                               # of each worker: two of two threads each take four times as long
workers=(-n auto --maxprocesses 8 --dist loadfile)
if [ "$#" -eq 0 ]; then
    say "pytest: a part in another order, on older instructions"
    ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 "$venv_python" -m pytest -q -m "not slow and not alone" \
        "${workers[@]}" -p randomly --randomly-seed=7 tests/*/test_layers.py tests/*/test_functional.py \
        tests/core/training/test_step_context.py || status=$?
fi
say "pytest: everything, a worker a core"
"$venv_python" -m pytest -m "not slow and not alone" "${workers[@]}" "$@" || status=$?
exit "$status"
