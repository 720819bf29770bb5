"""Trains a MarianTokenizer: one SentencePiece vocabulary for sources and targets."""

import io
import json
import os
from collections.abc import Iterable
from pathlib import Path

from transformers import MarianTokenizer

from hf_efx.core.files import replace_folder, staging_folder


def train_marian_tokenizer(
    folder: str | os.PathLike[str], texts: Iterable[str], vocab_size: int, max_length: int = 512
) -> MarianTokenizer:
    """Trains a SentencePiece model (unigram) on texts, and writes the files that `MarianTokenizer` loads.

    Texts are taken as they are, without Unicode normalisation, and every character in them becomes a token: what is
    decoded is what was encoded, but for runs of blanks. Equal texts give equal tokenizers.

    Args:
        folder: Where `source.spm`, `target.spm`, `vocab.json` and the tokenizer's config go, all or none of them.
        texts: Sources and targets.
        vocab_size: Tokens, `</s>` (0), `<unk>` (1) and `<pad>` (the last) among them.
        max_length: The tokenizer's `model_max_length`.

    Raises:
        ImportError: If sentencepiece isn't installed.
        ValueError: If the texts have too few different pieces for the vocabulary, or too many characters.
    """
    try:
        import sentencepiece
    except ImportError:
        raise ImportError("a vocabulary is trained by sentencepiece: pip install 'hf_efx[mt]'") from None
    model = io.BytesIO()  # of a file the model would keep the path
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size - 1,  # <pad> is the tokenizer's alone
            character_coverage=1.0,
            normalization_rule_name="identity",
            eos_id=0,
            unk_id=1,
            bos_id=-1,
            pad_id=-1,
            num_threads=1,  # sums in one order
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].rpartition(") ")[2]
        raise ValueError(f"vocab_size={vocab_size} doesn't go with the text: {reason}") from None
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    pieces = [*(processor.IdToPiece(i) for i in range(len(processor))), "<pad>"]
    vocabulary = json.dumps({piece: i for i, piece in enumerate(pieces)}, ensure_ascii=False)
    files = {"source.spm": model.getvalue(), "target.spm": model.getvalue(), "vocab.json": vocabulary.encode()}
    with staging_folder(Path(folder).parent) as staging:
        for name, content in files.items():
            (staging / name).write_bytes(content)
        MarianTokenizer(*(str(staging / name) for name in files), model_max_length=max_length).save_pretrained(staging)
        replace_folder(staging, Path(folder))
    return MarianTokenizer.from_pretrained(folder)
