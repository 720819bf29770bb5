#!/usr/bin/env bash
# Installs into .venv, then trains a small GPT-2 dense and in low-rank form: 2 to 4 minutes on two cores after the install.
#
#     bash scripts/quickstart.sh                 # options are those of scripts/quickstart.py, such as --dataset my_text.txt
#
# Needs Python 3.11 or newer, 4 GB of disk and the package index; may be run again at any time.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
source scripts/install.sh
install plot
exec "$venv_python" scripts/quickstart.py "$@"
