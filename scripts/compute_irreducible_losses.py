"""Computes irreducible losses for RHO-LOSS and GoldiProx, by a holdout or cross-fit, saves and pushes them as a table.

python scripts/compute_irreducible_losses.py --output_dir runs/losses --label_noise 0.1
accelerate launch scripts/compute_irreducible_losses.py --config run.yaml --push_table_to you/irreducible-losses
hf-efx rho-loss --irreducible_losses runs/losses/table --label_noise 0.1
"""

import sys

from hf_efx.rho_loss.program import irreducible_main

if __name__ == "__main__":
    sys.exit(irreducible_main())
