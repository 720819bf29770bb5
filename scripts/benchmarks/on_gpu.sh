#!/usr/bin/env bash
# Times the methods' training steps on one CUDA GPU, in at most 7 minutes, without network and data:
#
#     bash scripts/benchmarks/on_gpu.sh OUT              # OUT/<method>.json, and a line for each variant on the screen
#     bash scripts/benchmarks/on_gpu.sh OUT --quick      # a smoke run at a tiny size, on the CPU
#
# It installs nothing: PYTHON names a Python that has torch, transformers and peft (default: .venv's, else python3).
# To put the figures beside the CPU's: OUT=scripts/benchmarks/results/gpu, then scripts/render_results.py.
set -euo pipefail
repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
python=${PYTHON:-$repository/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
export PYTHONPATH="$repository${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" "$repository/scripts/benchmarks/on_gpu.py" "$@"
