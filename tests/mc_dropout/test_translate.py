"""Translating with uncertainty: answers and scores by definition, the same in any batch, bad input refused at once."""

import copy
import logging
import math

import numpy as np
import peft
import pytest
import torch
import transformers
from transformers import GenerationConfig

from hf_efx.core.scoring.sampling import sample_forward, sample_generate
from hf_efx.mc_dropout import TranslationOptions, Translator, bleuvar, token_statistics
from hf_efx.mc_dropout.sources import text_id
from mc_dropout.translators import POSITIONS, SOURCES, built, model_of, tokenizer_of

TOKENS = ["bleuvar", "beam_score", "sequence_probability", "token_entropy", "mutual_information", "epkl"]
LANGUAGES = {
    "m2m100": {"src_lang": "de", "tgt_lang": "en"},
    "mbart": {"src_lang": "de_DE", "tgt_lang": "en_XX"},
    "nllb": {"src_lang": "deu_Latn", "tgt_lang": "eng_Latn"},
}


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    return built("marian", tmp_path_factory.mktemp("marian") / "model")


def translate(made, sources=SOURCES, ids=None, options=None, **given):
    own, rest = TranslationOptions.split({"num_samples": 3, "uncertainties": TOKENS, **given})
    ids = [text_id(source) for source in sources] if ids is None else ids
    return Translator(*made, options or TranslationOptions(**own), **rest)(sources, ids)


def assert_same(one, other):
    """Texts equal, scores but for the rounding of float64."""
    for a, b in zip(one, other, strict=True):
        assert (a.source, a.translation, a.samples, a.note) == (b.source, b.translation, b.samples, b.note)
        assert a.uncertainties == pytest.approx(b.uncertainties, rel=1e-9, abs=1e-12, nan_ok=True)


def test_answer_samples_and_scores_are_what_their_definitions_say(marian):
    model, tokenizer = marian
    model.generation_config.update(num_beams=2, length_penalty=0.6)
    try:
        found = translate(marian, SOURCES[:3], [7, 8, 9], max_new_tokens=12)
        inputs = tokenizer(SOURCES[:3], return_tensors="pt", padding=True)
        answers = model.generate(**inputs, max_new_tokens=12, return_dict_in_generate=True, output_scores=True)
        drawn = sample_generate(model, inputs, 3, ids=[7, 8, 9], tokenizer=tokenizer, max_new_tokens=12)
    finally:
        model.generation_config.update(num_beams=None, length_penalty=None)
    assert [row.translation for row in found] == tokenizer.batch_decode(answers.sequences, skip_special_tokens=True)
    assert [list(row.samples) for row in found] == drawn.texts
    for i, row in enumerate(found):
        assert row.uncertainties["bleuvar"] == bleuvar(row.samples)
        # The score by which transformers' own beam search chose the answer.
        assert row.uncertainties["beam_score"] == pytest.approx(-float(answers.sequences_scores[i]), rel=1e-6)
        tokens = answers.sequences[i : i + 1, 1:]
        length = int((tokens != tokenizer.pad_token_id).sum())
        total = row.uncertainties["beam_score"] * length**0.6
        assert row.uncertainties["sequence_probability"] == pytest.approx(total, rel=1e-6)
        batch = tokenizer(SOURCES[i], return_tensors="pt") | {
            "decoder_input_ids": answers.sequences[i : i + 1, :length]
        }
        statistics = token_statistics(sample_forward(model, batch, 3, ids=[7 + i]), torch.ones(1, length))
        assert row.uncertainties["epkl"] == pytest.approx(statistics.epkl[0], rel=1e-9)


@pytest.mark.parametrize("kind", ["marian", "bart", "t5", "m2m100", "mbart", "nllb", "gpt2", "llama"])
def test_rows_depend_on_no_batch(kind, tmp_path):
    tokenizer = tokenizer_of({"bart": "marian", "t5": "marian"}.get(kind, kind), tmp_path / "tokenizer")
    forced = {"forced_bos_token_id": 5, "forced_eos_token_id": 0} if kind == "bart" else {}
    made = model_of({"nllb": "m2m100"}.get(kind, kind), tokenizer, **forced), tokenizer
    given = {**LANGUAGES.get(kind, {}), "num_beams": 2 if kind in ("bart", "gpt2") else None, "max_new_tokens": 8}
    whole = translate(made, **given)
    assert len({text for row in whole for text in row.samples}) >= 3
    turned = translate(made, SOURCES[::-1], max_batch_rows=4, **given)
    assert_same(turned[::-1], whole)
    for i in (0, 2):
        assert_same(translate(made, SOURCES[i : i + 1], **given), whole[i : i + 1])


@pytest.mark.parametrize("kind", ["marian", "gpt2"])
@pytest.mark.parametrize(
    "config",
    [
        {"no_repeat_ngram_size": 2, "repetition_penalty": 1.5},
        {"num_beams": 3, "early_stopping": True, "length_penalty": 2.0, "min_new_tokens": 2},
        {"do_sample": True, "temperature": 0.5, "top_k": 5, "top_p": 0.9, "max_length": 30},
        {"suppress_tokens": [2, 3], "begin_suppress_tokens": [4], "forced_eos_token_id": 0, "max_length": 20},
    ],
    ids=["repetition", "beams", "drawing", "suppressed"],
)
def test_the_model_s_own_generation_config_is_followed(kind, config, tmp_path, caplog):
    model, tokenizer = built(kind, tmp_path / "model")
    model.generation_config.update(**config)
    before = model.generation_config.to_dict()
    with caplog.at_level(logging.WARNING, "transformers"):
        logging.getLogger("transformers").propagate = True
        whole = translate((model, tokenizer), SOURCES[:3])
        assert_same(translate((model, tokenizer), SOURCES[1:2]), whole[1:2])
    assert caplog.records == []
    assert model.generation_config.to_dict() == before
    drawing = ("do_sample", "temperature", "top_k", "top_p", "max_length")
    kept = {name: value for name, value in config.items() if name not in drawing}
    tokens = tokenizer(SOURCES[0], return_tensors="pt")
    limit = 2 ** math.ceil(math.log2(2 * tokens["input_ids"].shape[1] + 16))
    model.generation_config = GenerationConfig.from_model_config(model.config)
    limit = min(limit, POSITIONS - 1) if kind == "marian" else limit
    answer = model.generate(**tokens, max_new_tokens=limit, pad_token_id=whole and model.config.pad_token_id, **kept)
    begin = 1 if kind == "marian" else tokens["input_ids"].shape[1]
    assert tokenizer.decode(answer[0, begin:], skip_special_tokens=True) == whole[0].translation


def test_the_model_s_state_and_the_tokenizer_are_left_alone(tmp_path):
    model, tokenizer = built("m2m100", tmp_path / "model")
    tokenizer.src_lang = "fr"
    for training in (True, False):
        model.train(training)
        state = torch.random.get_rng_state()
        translate((model, tokenizer), SOURCES[:2], **LANGUAGES["m2m100"])
        assert all(module.training == training for module in model.modules())
        assert torch.equal(torch.random.get_rng_state(), state)
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("fr", None)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_wrapped_models_translate_as_what_is_inside(marian, caplog):
    model, tokenizer = marian
    expected = translate(marian, SOURCES[:2])
    with caplog.at_level(logging.WARNING, "hf_efx"):
        compiled = torch.compile(model, backend="eager")
        for _ in range(2):
            assert_same(translate((compiled, tokenizer), SOURCES[:2]), expected)
    assert [record.message.split(",")[0] for record in caplog.records] == [
        "MarianMTModel is sampled outside its wrappers"
    ]  # said once
    assert_same(translate((torch.nn.DataParallel(model), tokenizer), SOURCES[:2]), expected)
    lora = peft.LoraConfig(task_type="SEQ_2_SEQ_LM", target_modules=["q_proj"], lora_dropout=0.0)
    assert_same(translate((peft.get_peft_model(copy.deepcopy(model), lora), tokenizer), SOURCES[:2]), expected)


def test_half_precision_translates(marian):
    model, tokenizer = copy.deepcopy(marian[0]).bfloat16(), marian[1]
    rows = translate((model, tokenizer), SOURCES[:2])
    assert all(np.isfinite(list(row.uncertainties.values())).all() for row in rows)


def test_empty_sources_never_reach_the_model(marian, monkeypatch):
    model, _ = marian
    monkeypatch.setattr(model, "forward", None)
    for row in translate(marian, ["", " \t\n", "\u3000"]):
        assert (row.translation, row.samples, row.note) == ("", (), "empty source")
        assert list(row.uncertainties) == TOKENS and all(map(math.isnan, row.uncertainties.values()))


def test_symbols_and_emoji_are_scored_as_any_other(marian):
    for row in translate(marian, ["?!", "...", "\U0001f600", "\u2028", "§"][:3]):
        assert len(row.samples) == 3 and not np.isnan(list(row.uncertainties.values())).any()


def test_a_long_source_is_refused_or_cut(marian, tmp_path):
    for made, words in ((marian, 40), (built("gpt2", tmp_path / "gpt2"), 16)):
        long = "eins " * words
        match = r"source 'eins eins .*\.\.\. has \d+ tokens, the model takes \d+: shorten it, or give truncation=True"
        with pytest.raises(ValueError, match=match):
            translate(made, ["zwei", long])
        short, cut = translate(made, ["zwei", long], truncation=True)
        assert cut.note.startswith("source truncated") and not short.note.startswith("source")
        assert len(cut.samples) == 3


def test_an_answer_that_hits_the_limit_is_marked(marian, tmp_path):
    forced = built("bart", tmp_path / "model", forced_eos_token_id=0)
    for made in (marian, forced):
        for row in translate(made, ["eins", "drei"], max_new_tokens=3, min_new_tokens=3):
            assert row.note == "translation unfinished"
    model, tokenizer = marian
    (row,) = translate(marian, ["eins"], sequence_bias={(tokenizer.eos_token_id,): 1e6}, max_new_tokens=3)
    assert (row.note, row.translation, row.uncertainties["bleuvar"]) == ("", "", 0.0)


def test_samples_by_temperature_without_dropout(marian):
    drawn = {"sites": [], "do_sample": True, "temperature": 2.0, "uncertainties": ["bleuvar"]}
    one, other = (translate(marian, SOURCES[:3], **drawn, max_batch_rows=rows) for rows in (160, 2))
    assert_same(one, other)
    assert len(set(one[0].samples)) > 1
    assert [row.translation for row in one] == [row.translation for row in translate(marian, SOURCES[:3])]
    with pytest.raises(ValueError, match=r"sites=\[\] turns all dropout off, .* give do_sample=True"):
        translate(marian, sites=[], uncertainties=["bleuvar"])
    with pytest.raises(ValueError, match=r"sites=\[\] leaves scores of tokens without dropout"):
        translate(marian, sites=[], do_sample=True)


def test_sites_and_masks_change_the_samples_and_the_scores_of_tokens(marian):
    usual = translate(marian, SOURCES[:3])
    for given in ({"sites": ["encoder"]}, {"masks": "sequence"}, {"seed": 1}):
        rows = translate(marian, SOURCES[:3], **given)
        assert [row.translation for row in rows] == [row.translation for row in usual]
        assert [row.uncertainties["epkl"] for row in rows] != [row.uncertainties["epkl"] for row in usual]
        assert [row.samples for row in rows] != [row.samples for row in usual]


def test_the_sample_most_like_the_others_is_chosen(marian):
    for row in translate(marian, SOURCES[:3], choose="mbr", num_samples=5):
        assert row.translation in row.samples


def test_stop_strings_end_answers_and_samples(tmp_path):
    made = built("llama", tmp_path)
    stops = [chr(i) for i in range(1, 127)]
    for row in translate(made, SOURCES[:3], stop_strings=stops, uncertainties=["bleuvar", "sequence_probability"]):
        for text in (row.translation, *row.samples):
            assert text[-1] in stops and not set(text[:-1]) & set(stops)
        assert row.note == "" and row.uncertainties["sequence_probability"] < 100


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"num_samples": 1}, "num_samples=1: one sample has nothing to differ from, give 2 or more"),
        ({"num_samples": -2}, "num_samples=-2"),
        ({"num_samples": 2.5}, "num_samples=2.5: expected an integer"),
        ({"max_batch_rows": 0}, "max_batch_rows=0: expected 1 or more"),
        ({"num_beams": 0}, "num_beams=0"),
        ({"max_new_tokens": POSITIONS}, f"max_new_tokens={POSITIONS}: the model has {POSITIONS} positions"),
        ({"masks": "token"}, "masks='token' is unknown; choose 'position' or 'sequence'"),
        ({"choose": "best"}, "choose='best' is unknown"),
        ({"choose": "mbr", "num_samples": 0}, "num_samples=0 leaves choose='mbr' nothing"),
        ({"uncertainties": ["bleu"]}, "'bleu' is unknown; choose from bleuvar"),
        ({"uncertainties": "bleuvar"}, "expected a list of different names"),
        ({"uncertainties": ["epkl", "epkl"]}, "expected a list of different names"),
        ({"num_return_sequences": 4}, "num_return_sequences=4: the samples of a source are num_samples"),
        ({"max_length": 20}, "max_length=20: give max_new_tokens"),
        ({"num_beams": 2, "do_sample": True}, "num_beams=2 with do_sample=True"),
        ({"sites": ["encode"]}, "sites: 'encode' matches no module"),
        ({"src_lang": "de"}, "src_lang='de': MarianTokenizer knows no languages, leave it out"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_a_call_of_the_model(given, match, marian, monkeypatch):
    monkeypatch.setattr(marian[0], "forward", None)
    with pytest.raises(ValueError, match=match):
        translate(marian, **given)


def test_wrong_sources_are_refused(marian):
    with pytest.raises(ValueError, match=r"sources\[1\]=3: expected a text"):
        translate(marian, ["eins", 3], [0, 1])


@pytest.mark.parametrize("kind", ["m2m100", "mbart", "nllb"])
def test_languages_of_a_multilingual_model(kind, tmp_path):
    tokenizer = tokenizer_of(kind, tmp_path / "tokenizer")
    made = model_of({"nllb": "m2m100"}.get(kind, kind), tokenizer), tokenizer
    right = LANGUAGES[kind]
    some = f"choose from .*{right['src_lang']}.*{right['tgt_lang']}"
    for name in right:
        for value in (None, "xx"):
            with pytest.raises(ValueError, match=f"{name}={value!r}: {type(tokenizer).__name__} translates.*{some}"):
                translate(made, **{**right, name: value})
    with pytest.raises(ValueError, match="forced_bos_token_id=5: it follows from tgt_lang"):
        translate(made, **right, forced_bos_token_id=5)
    expected = tokenizer._build_translation_inputs(["zwei hundert"], return_tensors="pt", **right)
    (row,) = translate(made, ["zwei hundert"], **right, max_new_tokens=9)
    answer = made[0].generate(**expected, max_new_tokens=9)
    assert row.translation == tokenizer.decode(answer[0, 2:], skip_special_tokens=True)
    turned = translate(made, ["zwei hundert"], src_lang=right["tgt_lang"], tgt_lang=right["src_lang"])[0]
    assert turned.uncertainties != row.uncertainties


def test_languages_of_a_marian_model(tmp_path):
    tokenizer = tokenizer_of("marian", tmp_path / "tokenizer", codes=[">>deu<<", ">>nld<<"])
    made = model_of("marian", tokenizer), tokenizer
    (named,) = translate(made, ["eins"], [4], tgt_lang="nld")
    (written,) = translate(made, [">>nld<< eins"], [4])
    assert (named.translation, named.samples) == (written.translation, written.samples)
    assert translate(made, ["eins"], [4], tgt_lang=">>nld<<")[0] == named
    assert translate(made, ["eins"], [4], tgt_lang="deu")[0].uncertainties != named.uncertainties
    match = "tgt_lang='eng': MarianTokenizer translates between languages, choose from deu, nld"
    with pytest.raises(ValueError, match=match):
        translate(made, tgt_lang="eng")
    with pytest.raises(ValueError, match="tgt_lang=None, and source 'eins' begins with no code: .* deu, nld"):
        translate(made)


def test_models_that_cannot_be_sampled_are_refused_at_once(tmp_path, marian):
    config = {"dropout": 0.0, "activation_dropout": 0.0, "attention_dropout": 0.0}
    without = model_of("marian", marian[1], **config)
    with pytest.raises(ValueError, match=r"MarianMTModel has no dropout .*attention_dropout=0.0.*set a rate above 0"):
        Translator(without, marian[1])
    assert translate((without, marian[1]), num_samples=0, uncertainties=["bleuvar"])[0].samples == ()
    llama = built("llama", tmp_path / "llama", attention_dropout=0.0)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no dropout .*attention_dropout=0.0"):
        Translator(*llama)
    part = copy.deepcopy(marian[0])
    part.model.encoder = torch.compile(part.model.encoder, backend="eager")
    with pytest.raises(ValueError, match="a part of MarianMTModel is compiled"):
        Translator(part, marian[1])
    with pytest.raises(ValueError, match="MarianModel doesn't generate: load a model for seq2seq or causal LM"):
        Translator(transformers.MarianModel(marian[0].config), marian[1])


def test_a_decoder_only_model_is_padded_on_the_left_by_its_end_token(tmp_path, caplog):
    model, tokenizer = built("gpt2", tmp_path / "model")
    tokenizer.pad_token, tokenizer.padding_side = None, "right"
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    with caplog.at_level(logging.INFO, "hf_efx"):
        whole = translate((model, tokenizer), SOURCES[:3])
    assert "GPT2LMHeadModel: sources are padded on the left, by token 256" in caplog.messages
    for i in range(3):
        assert_same(translate((model, tokenizer), SOURCES[i : i + 1]), whole[i : i + 1])
    assert tokenizer.pad_token is None and tokenizer.padding_side == "right"
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no end token: give eos_token_id"):
        translate((model, tokenizer))
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="neither a pad nor an end token: set tokenizer.pad_token"):
        translate((model, tokenizer))


def test_without_sacrebleu_the_extra_is_named(marian, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu.metrics", None)
    monkeypatch.setattr(marian[0], "forward", None)
    with pytest.raises(ImportError, match=r"pip install 'hf_efx\[mt\]'"):
        translate(marian)


def test_a_generation_config_of_one_s_own(marian):
    config = GenerationConfig(num_beams=2, no_repeat_ngram_size=1)
    given = translate(marian, SOURCES[:2], generation_config=config)
    assert_same(given, translate(marian, SOURCES[:2], num_beams=2, no_repeat_ngram_size=1))
    assert config.max_new_tokens is None
