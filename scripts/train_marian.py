"""Trains a Marian translation model on pairs, for `accelerate launch`: SentencePiece vocabulary, training, BLEU, card.

    python scripts/train_marian.py                                  # number words, German to English
    accelerate launch scripts/train_marian.py --dataset strings.tsv.gz --source_column de --target_column en

Two processes on one CPU machine:

    accelerate launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no \
        scripts/train_marian.py --config run.yaml
"""

import sys

from hf_efx.programs.train_marian import main

if __name__ == "__main__":
    sys.exit(main())
