"""Translates standard input, a file or a data set, and says of each text how uncertain the model is.

echo "Wo ist der Bahnhof?" | python scripts/translate_with_uncertainty.py --model runs/marian
python scripts/translate_with_uncertainty.py --model runs/marian --dataset letters.txt --json
"""

import sys

from hf_efx.mc_dropout.program import translate_main

if __name__ == "__main__":
    sys.exit(translate_main())
