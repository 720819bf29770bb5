"""Prunes any checkpoint: its curve, zeros or a really smaller model, and what that saves in bytes and time.

python scripts/prune.py --model runs/targeted_dropout --fraction 0.9
python scripts/prune.py --model gpt2 --task causal_lm --dataset my_text.jsonl \
    --granularity unit --target_modules c_fc --fraction 0.5 --shrink
"""

import sys

from hf_efx.targeted_dropout.program import prune_main

if __name__ == "__main__":
    sys.exit(prune_main())
