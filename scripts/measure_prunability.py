"""`hf-efx prunability` as a script: how much of a checkpoint's weights its training loss can do without.

python scripts/measure_prunability.py --model you/model --task text_classification --dataset reviews.csv
"""

import sys

from hf_efx.prunability.program import main

if __name__ == "__main__":
    sys.exit(main())
