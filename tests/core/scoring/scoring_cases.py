"""Tiny models with a padded batch and its rows one at a time, for the tests of scoring."""

import torch
import transformers

LENGTHS = (3, 7, 1, 5, 7, 2)
WIDTH, VOCAB = 9, 13  # no row fills the batch: some of the padding is that of other examples of a large draw
SIZE = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


def _padded(rows, fill, side):
    def row(values):
        padding = torch.full((WIDTH - len(values), *values.shape[1:]), fill)
        return torch.cat([padding, values] if side == "left" else [values, padding])

    return torch.stack([row(values) for values in rows])


def _rows(seed, vocab=VOCAB, low=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, vocab, (length,), generator=generator) for length in LENGTHS]


def _text(side, labels=None):
    """A batch of tokens and its rows one at a time, without padding. `labels` of the rows, the tokens by default."""
    ids = _rows(0)
    labels = ids if labels is None else labels
    ones = [torch.ones_like(row) for row in ids]
    batch = {"input_ids": _padded(ids, 1, side), "attention_mask": _padded(ones, 0, side)}
    per_token = isinstance(labels, list)
    batch["labels"] = _padded(labels, -100, side) if per_token else labels
    alone = [
        {"input_ids": ids[i][None], "attention_mask": ones[i][None], "labels": labels[i][None]}
        for i in range(len(ids))
    ]
    return batch, alone


def gpt2(**options):
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=12, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, **options
    )
    return transformers.GPT2LMHeadModel(config)


def _roberta_lm():
    # It counts positions from the ids itself, after the pad id: position_ids from outside would be other ones.
    config = transformers.RobertaConfig(
        vocab_size=VOCAB, pad_token_id=1, max_position_embeddings=16, is_decoder=True, **SIZE
    )
    return transformers.RobertaForCausalLM(config)


def _llama():
    config = transformers.LlamaConfig(vocab_size=VOCAB, num_key_value_heads=1, **SIZE)
    return transformers.LlamaForCausalLM(config)


def bert(head, num_labels=4, **options):
    return head(transformers.BertConfig(vocab_size=VOCAB, num_labels=num_labels, **SIZE, **options))


def _gpt2_classes():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_positions=12, n_embd=8, n_layer=1, n_head=2, num_labels=4, pad_token_id=1
    )
    return transformers.GPT2ForSequenceClassification(config)


def _xlnet():
    return transformers.XLNetForSequenceClassification(
        transformers.XLNetConfig(vocab_size=VOCAB, d_model=8, n_layer=1, n_head=2, d_inner=16, num_labels=4)
    )


def _masked_labels():
    labels = _rows(1)
    return [row.masked_fill(torch.arange(len(row)) % 2 == 1, -100) for row in labels]


def _text_case(model, side, labels=None):
    return lambda: (model(), *_text(side, labels))


def _seq2seq_case(model, side):
    def case():
        batch, alone = _text(side)
        # As wide as the source: what belongs to which side can't be told by width.
        targets = _rows(3)[::-1]
        batch["labels"] = _padded(targets, -100, "right")
        return model(), batch, [row | {"labels": target[None]} for row, target in zip(alone, targets, strict=True)]

    return case


def _t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCAB, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0,
            pad_token_id=1,
        )
    )  # fmt: skip


def _m2m100():  # no hook that shifts labels: it is given them
    return transformers.M2M100ForConditionalGeneration(
        transformers.M2M100Config(
            vocab_size=VOCAB, d_model=8, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
            decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=16,
            pad_token_id=1, decoder_start_token_id=0, bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def _vit():
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, num_labels=4, **SIZE)
    images = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = {"pixel_values": images, "labels": torch.tensor([0, 3, 1, 2, 2, 0])}
    rows = [{name: value[i : i + 1] for name, value in batch.items()} for i in range(6)]
    return transformers.ViTForImageClassification(config), batch, rows


CLASSES = torch.tensor([3, 0, 1, 2, 2, 0])
CASES = {
    "gpt2 right": ("causal", _text_case(gpt2, "right")),
    "gpt2 left": ("causal", _text_case(gpt2, "left")),
    "llama left": ("causal", _text_case(_llama, "left")),
    "roberta lm left": ("causal", _text_case(_roberta_lm, "left")),
    "bert masked": ("masked", _text_case(lambda: bert(transformers.BertForMaskedLM), "right", _masked_labels())),
    "bert masked left": ("masked", _text_case(lambda: bert(transformers.BertForMaskedLM), "left", _masked_labels())),
    "bert tokens": (
        "token_classification",
        _text_case(lambda: bert(transformers.BertForTokenClassification), "right", _rows(2, 4, 0)),
    ),
    "bert classes": (
        "classification",
        _text_case(lambda: bert(transformers.BertForSequenceClassification), "right", CLASSES),
    ),
    "gpt2 classes left": ("classification", _text_case(_gpt2_classes, "left", CLASSES)),
    "xlnet classes left": ("classification", _text_case(_xlnet, "left", CLASSES)),
    "bert regression": (
        "regression",
        _text_case(lambda: bert(transformers.BertForSequenceClassification, 1), "right", torch.linspace(-2, 2, 6)),
    ),
    "bert regression 2": (
        "regression",
        _text_case(
            lambda: bert(transformers.BertForSequenceClassification, 2, problem_type="regression"),
            "right",
            torch.linspace(-2, 2, 12).reshape(6, 2),
        ),
    ),
    "t5": ("seq2seq", _seq2seq_case(_t5, "right")),
    "t5 left": ("seq2seq", _seq2seq_case(_t5, "left")),
    "m2m100 left": ("seq2seq", _seq2seq_case(_m2m100, "left")),
    "vit": ("classification", _vit),
}


def losses_alone(model, rows):
    """What the model itself says of each row without padding: its loss (NaN where it has no label) and the logits."""
    with torch.no_grad():
        outputs = [model.eval()(**row) for row in rows]
    return torch.stack([output.loss for output in outputs]).nan_to_num(), [output.logits for output in outputs]
