"""`hf-efx slice-out` as a script for `accelerate launch`: a language model or a classifier of text or images.

    accelerate launch scripts/train_slice_out.py --task causal_lm --rate 0.5 --compare none dropout
    accelerate launch scripts/train_slice_out.py --task image_classification --dataset fashion_mnist/ --config run.yaml

Two processes on one CPU machine:

    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
        scripts/train_slice_out.py --config run.yaml --same_on_all_ranks false
"""

import sys

from hf_efx.slice_out.program import main

if __name__ == "__main__":
    sys.exit(main())
