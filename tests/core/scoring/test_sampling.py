"""Samples with dropout on: each by itself the same in any batch, the model untouched, bad input refused."""

import copy
import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from test_scoring_state import Normed, _assert_same, _everything

from hf_efx.core.scoring.sampling import check_sampling, dropout_active, sample_forward, sample_generate

PAD, END, VOCAB = 1, 0, 64
_TOKENS: dict[str, Any] = {"vocab_size": VOCAB, "eos_token_id": END, "bos_token_id": END}
_SEQ2SEQ: dict[str, Any] = {
    "encoder_layers": 2, "decoder_layers": 2, "d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 40,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "max_position_embeddings": 40, "pad_token_id": PAD,
    "decoder_start_token_id": PAD, "dropout": 0.3,
}  # fmt: skip
_START: dict[str, Any] = {"decoder_start_token_id": PAD}
_FORCED: dict[str, Any] = {"forced_bos_token_id": 5, "forced_eos_token_id": END}
_DECODER: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
BUILD: dict[str, Any] = {
    "marian": lambda: transformers.MarianMTModel(
        transformers.MarianConfig(**_TOKENS, **_SEQ2SEQ, attention_dropout=0.1, encoder_layerdrop=0.5)
    ),
    "bart": lambda: transformers.BartForConditionalGeneration(
        transformers.BartConfig(**_TOKENS, **_SEQ2SEQ, **_FORCED)
    ),
    "m2m100": lambda: transformers.M2M100ForConditionalGeneration(transformers.M2M100Config(**_TOKENS, **_SEQ2SEQ)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(
            vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, pad_token_id=PAD,
            eos_token_id=END, dropout_rate=0.3, **_START,
        )
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**_TOKENS, n_positions=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.3)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **_TOKENS, **_DECODER, intermediate_size=48, num_key_value_heads=2, attention_dropout=0.3
        )
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(
            **_TOKENS, **_DECODER, word_embed_proj_dim=32, ffn_dim=48, pad_token_id=PAD, dropout=0.3,
            max_position_embeddings=64,
        )
    ),
}  # fmt: skip
LENGTHS = (3, 7, 5, 2)


def build(name):
    """In float64, with weights large enough for sequences to differ."""
    torch.manual_seed(0)
    model = BUILD[name]().eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def sources(model, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(2, VOCAB, (length,), generator=generator) for length in lengths]
    side = "right" if model.config.is_encoder_decoder else "left"
    pad = torch.nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True, padding_side=side)
    return {"input_ids": pad(rows, True, PAD, side), "attention_mask": mask}, rows


def generate(model, inputs, n=4, **options):
    return sample_generate(model, inputs, n, **{"max_new_tokens": 6, "seed": 3, **options})


def assert_same(one, other):
    assert one.sequences == other.sequences and one.lengths == other.lengths
    torch.testing.assert_close(
        torch.tensor(one.log_probs, dtype=torch.float64), torch.tensor(other.log_probs, dtype=torch.float64)
    )


def ids_of(samples, row):
    return SimpleNamespace(**{name: [getattr(samples, name)[row]] for name in ("sequences", "lengths", "log_probs")})


OPTIONS = ({}, {"masks": "sequence"}, {"do_sample": True}, {"num_beams": 2})


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in BUILD] + [(name, options) for name in ("marian", "llama") for options in OPTIONS[1:]],
    ids=str,
)
def test_a_sample_depends_on_no_batch(name, options):
    model = build(name)
    inputs, rows = sources(model)
    whole = generate(model, inputs, **options)
    assert len({tuple(sequence) for row in whole.sequences for sequence in row}) > len(rows)
    order = torch.tensor([2, 0, 3, 1])
    turned = generate(model, {k: v[order] for k, v in inputs.items()}, ids=order, max_batch_rows=6, **options)
    for at, row in enumerate(order.tolist()):
        assert_same(ids_of(turned, at), ids_of(whole, row))
    for i in (0, 3):
        assert_same(generate(model, rows[i][None], ids=[i], **options), ids_of(whole, i))


@pytest.mark.parametrize("name", ["marian", "gpt2", "llama"])
def test_the_cache_changes_nothing(name):
    model = build(name)
    inputs, _ = sources(model)
    assert_same(generate(model, inputs, use_cache=False), generate(model, inputs))


class _Words:
    def batch_decode(self, rows, skip_special_tokens):
        return [" ".join(map(str, row)) for row in rows]


@pytest.mark.parametrize("name", ["marian", "bart", "gpt2"])
def test_log_probs_are_those_of_the_masked_model(name, monkeypatch):
    def never(stop_strings, tokenizer):
        return lambda tokens, scores: torch.zeros(len(tokens), dtype=torch.bool)

    model = build(name)
    inputs, _ = sources(model)
    # With stop strings transformers' own loop generates, and a pass over the whole gives the log-probabilities.
    monkeypatch.setattr("transformers.generation.utils.StopStringCriteria", never)
    own = generate(model, inputs, stop_strings=["x"], tokenizer=_Words())
    assert_same(own, generate(model, inputs))
    assert own.texts is not None and own.texts[1][2] == " ".join(map(str, own.sequences[1][2]))


def test_num_samples_are_the_first_of_more():
    model = build("marian")
    inputs, _ = sources(model)
    few, many = generate(model, inputs, 2), generate(model, inputs, 5)
    assert few.sequences == [row[:2] for row in many.sequences]
    assert generate(model, inputs, 5, seed=4).sequences != many.sequences
    assert generate(model, inputs, 5, masks="sequence").sequences != many.sequences


def test_what_ends_is_stripped_and_counted():
    model = build("bart")
    inputs, _ = sources(model)
    samples = generate(model, inputs, 6, max_new_tokens=8)
    for row, lengths in zip(samples.sequences, samples.lengths, strict=True):
        for tokens, length in zip(row, lengths, strict=True):
            assert END not in tokens and PAD not in tokens
            # The first is forced and so is the end at the limit; an end before it is drawn.
            assert length == len(tokens) + 1 if len(tokens) < 6 else length in (len(tokens), len(tokens) + 1)


def test_finished_rows_are_left_out():
    model = build("marian")
    inputs, _ = sources(model)
    options = {"max_new_tokens": 12, "eos_token_id": list(range(2, 20))}  # ends come early, at different steps
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    dropping = generate(model, inputs, 6, **options)
    rows, seen[:] = seen[:], []
    kept = generate(model, inputs, 6, **options, prefix_allowed_tokens_fn=lambda row, ids: list(range(VOCAB)))
    hook.remove()
    assert_same(dropping, kept)
    assert rows[0] == 24 and rows[-1] < 24 and set(seen) == {24}


def test_right_padding_and_a_lacking_mask():
    model = build("gpt2")
    inputs, rows = sources(model)
    right = torch.nn.utils.rnn.pad_sequence(rows, True, PAD)
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    assert_same(generate(model, {"input_ids": right, "attention_mask": mask.long()}), generate(model, inputs))
    marian = build("marian")
    given, _ = sources(marian)
    assert_same(generate(marian, given["input_ids"]), generate(marian, given))


def test_eager_and_torch_s_attention_drop_alike():
    model = build("llama").float()  # eager's mask overflows its softmax of float32 in a float64 model
    inputs, _ = sources(model)
    one = sample_forward(model, inputs, 3)
    model.set_attn_implementation("eager")
    other = sample_forward(model, inputs, 3)
    mask = inputs["attention_mask"].bool()
    torch.testing.assert_close(one[:, mask], other[:, mask], rtol=1e-4, atol=1e-4)


def test_without_dropout_samples_are_drawn():
    model = build("llama")
    inputs, _ = sources(model)
    drawn = generate(model, inputs, sites=[], do_sample=True)
    plain = model(**{k: v[1:2] for k, v in inputs.items()}).logits[0, -1].log_softmax(-1)
    assert len({tuple(tokens) for tokens in drawn.sequences[1]}) > 1
    one = generate(model, inputs, sites=[], do_sample=True, max_new_tokens=1, temperature=2.0)
    for tokens, log_prob in zip(one.sequences[1], one.log_probs[1], strict=True):
        assert log_prob == pytest.approx(plain[tokens[0] if tokens else END].item(), rel=1e-6)


@pytest.mark.parametrize("name", ["vit", "marian", "gpt2"])
def test_forward(name):
    if name == "vit":
        size: dict[str, Any] = {
            "hidden_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
        }
        rates: dict[str, Any] = {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}
        model = transformers.ViTForImageClassification(
            transformers.ViTConfig(image_size=8, patch_size=4, num_channels=1, **size, **rates)
        )
        model, batch = model.double(), {"pixel_values": torch.randn(4, 1, 8, 8, dtype=torch.float64)}
    else:
        model = build(name)
        batch, _ = sources(model)
        batch["labels"] = torch.randint(2, VOCAB, (4, 6) if name == "marian" else batch["input_ids"].shape)
    logits = sample_forward(model, batch, 5, seed=1)
    assert logits.shape[:2] == (5, 4) and not torch.equal(logits[0], logits[1])
    order = torch.tensor([3, 1])
    some = sample_forward(model, {k: v[order] for k, v in batch.items()}, 2, seed=1, ids=order)
    torch.testing.assert_close(some, logits[:2, order])
    assert not torch.equal(sample_forward(model, batch, 2, seed=2), logits[:2])


def test_forward_takes_many_rows():
    model = build("gpt2")
    tokens = torch.randint(2, VOCAB, (100, 3))
    logits = sample_forward(model, {"input_ids": tokens}, 3)
    torch.testing.assert_close(logits[:, 7:8], sample_forward(model, {"input_ids": tokens[7:8]}, 3, ids=[7]))


@pytest.mark.parametrize("fail", [False, True], ids=["", "exception"])
def test_nothing_is_left_behind(fail):
    model = Normed().train()
    batch = {"x": torch.randn(8, 4), "labels": torch.randint(0, 3, (8,))}
    model(**batch)[0].backward()
    model.context.begin_step(0)
    model.norm.eval()
    before, model.fail = _everything(model), fail
    if fail:
        with pytest.raises(RuntimeError, match="told to fail"):
            sample_forward(model, batch, 3)
    else:
        sample_forward(model, batch, 3)
    _assert_same(before, _everything(model))
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_generation_leaves_the_model_as_it_was():
    model = build("marian").train()
    model.generation_config.num_beams = 4  # as Hub configs have it; samples are greedy all the same
    inputs, _ = sources(model)
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    state, attributes = torch.get_rng_state(), {name: set(vars(m)) for name, m in model.named_modules()}
    greedy = generate(model, inputs)
    assert greedy.sequences == generate(model, inputs, num_beams=1).sequences
    with pytest.raises(RuntimeError, match="on purpose"):
        generate(model, inputs, prefix_allowed_tokens_fn=_failing)
    assert model.config.to_dict() == config.to_dict() and model.generation_config == generation
    assert torch.equal(torch.get_rng_state(), state) and all(m.training for m in model.modules())
    assert attributes == {name: set(vars(m)) for name, m in model.named_modules()}
    assert model.model.encoder.layerdrop == 0.5


def _failing(row, ids):
    raise RuntimeError("on purpose")


def test_encoder_and_decoder_dropout_both_act():
    model = build("marian")
    inputs, _ = sources(model)
    runs = [generate(model, inputs, sites=sites).log_probs for sites in (None, ["encoder"], ["decoder"])]
    assert runs[0] != runs[1] != runs[2] != runs[0]
    assert all(len(set(row)) == len(row) for run in runs for row in run)


def test_a_wrapped_model_is_unwrapped_and_says_so_once(caplog):
    model = build("gpt2")
    inputs, _ = sources(model)
    expected = generate(model, inputs)
    compiled = torch.compile(model, backend="eager")
    with caplog.at_level(logging.WARNING, "hf_efx"):
        assert_same(generate(compiled, inputs), expected)
        sample_forward(compiled, inputs, 2)  # pyright: ignore[reportArgumentType]
    assert len([r for r in caplog.records if "outside its wrappers" in r.message]) == 1
    model.compile(backend="eager")
    call = model._compiled_call_impl
    assert_same(generate(model, inputs), expected)
    assert model._compiled_call_impl is call


@pytest.mark.parametrize("n", [1, 0, -1, 2.0, True])
def test_too_few_samples_are_refused(n):
    model = build("gpt2")
    for call in (sample_generate, sample_forward):
        with pytest.raises(ValueError, match="num_samples=.*2 or more"):
            call(model, sources(model)[0], n)


BAD = {
    "num_return_sequences": ({"num_return_sequences": 3}, "num_samples"),
    "max_batch_rows": ({"max_batch_rows": 0}, "max_batch_rows=0"),
    "ids": ({"ids": [1, 2]}, "one integer for each of 4 rows"),
    "float ids": ({"ids": [1.0, 2, 3, 4]}, "one integer"),
    "masks": ({"masks": "row"}, "masks='row'"),
    "no sites": ({"sites": []}, "do_sample=True"),
    "beams": ({"num_beams": 2, "do_sample": True}, "num_beams=2 with do_sample"),
    "max_length": ({"max_length": 20, "max_new_tokens": None}, "give max_new_tokens"),
    "sites without dropout": ({"sites": ["ln_f"]}, "agree bit for bit"),
    "stop strings": ({"stop_strings": ["x"]}, "tokenizer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    options, message = BAD[case]
    model = build("gpt2")
    with pytest.raises(ValueError, match=message):
        generate(model, sources(model)[0], **options)
    assert not model.training


def test_no_dropout_is_refused_with_the_config_s_fields():
    model = build("llama")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    inputs, _ = sources(model)
    for call in (sample_forward, generate):
        with pytest.raises(ValueError, match=r"agree bit for bit \(attention_dropout=0.3\)"):
            call(model, inputs, 3)  # the config still says .3
    model.config.attention_dropout = 0.0
    with (
        pytest.raises(ValueError, match=r"no dropout has a rate above 0 \(attention_dropout=0.0\)"),
        dropout_active(model),
    ):
        pass


def test_kernels_out_of_reach_are_refused():
    model = build("llama")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ValueError, match="attention_dropout=0.3 in flex_attention"):
        generate(model, sources(model)[0])


def test_end_tokens_stand_in_for_padding(caplog):
    model = build("gpt2")
    assert model.generation_config.pad_token_id is None
    with caplog.at_level(logging.INFO, "hf_efx"):
        generate(model, sources(model)[0])
    assert "GPT2LMHeadModel has no pad token" in caplog.text
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no end token"):
        generate(model, sources(model)[0])


def test_repetition_penalty_sees_no_padding():
    model = build("gpt2")  # its padding is its end token, which a penalty would count
    inputs, rows = sources(model)
    whole = generate(model, inputs, repetition_penalty=1.5)
    for i, row in enumerate(rows):
        assert_same(generate(model, row[None], ids=[i], repetition_penalty=1.5), ids_of(whole, i))


def test_forward_passes_differ_by_the_sites_that_are_on():
    model = build("marian")
    inputs, _ = sources(model)
    batch = {**inputs, "decoder_input_ids": torch.full((len(LENGTHS), 3), PAD)}
    whole = sample_forward(model, batch, 2)
    torch.testing.assert_close(sample_forward(model, batch, 2, sites=["encoder", "decoder"]), whole)
    assert not torch.allclose(sample_forward(model, batch, 2, sites=["decoder"]), whole)
    with pytest.raises(ValueError, match="2 passes agree bit for bit"):
        sample_forward(model, batch, 2, sites=[])


def test_arguments_are_checked_without_a_call_of_the_model(monkeypatch):
    model = build("marian")
    monkeypatch.setattr(model, "forward", None)
    assert check_sampling(model, "position", ["decoder"], None, num_beams=3).num_beams == 3
    for options, match in (
        ({"sites": []}, "sites=.. turns all dropout off"),
        ({"sites": ["encode"]}, "'encode' matches no module"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
        ({"masks": "token"}, "masks='token' is unknown"),
    ):
        with pytest.raises(ValueError, match=match):
            check_sampling(model, **{"masks": "position", "sites": None, "tokenizer": None, **options})
