"""`hf-efx goldiprox --do replay` as a script for `accelerate launch`: trains any model on a sequence.

accelerate launch scripts/replay_sequence.py --config run.yaml --sequence you/sequence
"""

import sys

from hf_efx.goldiprox.program import main

if __name__ == "__main__":
    sys.exit(main(["--do", "replay", *sys.argv[1:]]))
