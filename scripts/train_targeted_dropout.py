"""`hf-efx targeted-dropout` as a script for `accelerate launch`: a language model or a classifier of text or images.

    accelerate launch scripts/train_targeted_dropout.py --task causal_lm --granularity unit --compare none
    accelerate launch scripts/train_targeted_dropout.py --task image_classification --config run.yaml

Two processes on one CPU machine:

    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
        scripts/train_targeted_dropout.py --config run.yaml
"""

import sys

from hf_efx.targeted_dropout.program import main

if __name__ == "__main__":
    sys.exit(main())
