"""`hf-efx goldiprox --do select` as a script for `accelerate launch`: a proxy selects a sequence, which is saved.

accelerate launch scripts/select_goldiprox.py --config run.yaml --num_steps 500 --push_sequence_to you/sequence
"""

import sys

from hf_efx.goldiprox.program import main

if __name__ == "__main__":
    sys.exit(main(["--do", "select", *sys.argv[1:]]))
