"""`hf-efx low-rank` as a script for `accelerate launch`: trains any causal language model, low-rank, on any text.

    accelerate launch scripts/train_low_rank_gpt2.py --config run.yaml --learning_rate 1e-3

Two processes on one CPU machine:

    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
        scripts/train_low_rank_gpt2.py --config run.yaml
"""

import sys

from hf_efx.low_rank.program import main

if __name__ == "__main__":
    sys.exit(main())
