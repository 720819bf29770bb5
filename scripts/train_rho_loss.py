"""`hf-efx rho-loss` as a script for `accelerate launch`: trains a text, image or causal language model by RHO-LOSS.

    accelerate launch scripts/train_rho_loss.py --config run.yaml --label_noise 0.1 --compare uniform

Two processes on one CPU machine:

    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
        scripts/train_rho_loss.py --config run.yaml --selection_scope global
"""

import sys

from hf_efx.rho_loss.program import main

if __name__ == "__main__":
    sys.exit(main())
