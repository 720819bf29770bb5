"""The pipeline `translation-with-uncertainty`: found in either order, its arguments, its threshold, what is saved."""

import json
import logging
import math
import warnings

import pytest
import torch
from datasets import Dataset
from transformers import pipeline
from transformers.pipelines.pt_utils import KeyDataset

from hf_efx.core.data.fingerprints import weights_fingerprint
from hf_efx.mc_dropout import TranslationOptions, Translator, choose_threshold
from hf_efx.mc_dropout.pipeline import TASK, TranslationWithUncertaintyPipeline
from hf_efx.mc_dropout.sources import text_id
from mc_dropout.translators import SOURCES, built

GIVEN = {"num_samples": 2, "max_new_tokens": 5}


@pytest.fixture(scope="module")
def marian(tmp_path_factory):
    """Model, tokenizer, and the folder where both are saved."""
    folder = tmp_path_factory.mktemp("marian")
    model, tokenizer = built("marian", folder / "tokenizer")
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return model, tokenizer, folder / "model"


@pytest.fixture
def translate(marian):
    return pipeline(TASK, model=str(marian[2]), device="cpu", **GIVEN)


def comparable(result):
    """NaN as None, scores as in float32 they agree."""
    scores = {k: None if math.isnan(v) else pytest.approx(v, rel=1e-6) for k, v in result["uncertainties"].items()}
    first = None if math.isnan(result["uncertainty"]) else pytest.approx(result["uncertainty"], rel=1e-6)
    return {**result, "uncertainties": scores, "uncertainty": first}


def plain(result):
    nothing = dict.fromkeys(k for k, v in result["uncertainties"].items() if math.isnan(v))
    return {
        **result,
        "uncertainties": {**result["uncertainties"], **nothing},
        "uncertainty": None if math.isnan(result["uncertainty"]) else result["uncertainty"],
    }


def assert_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert plain(a) == comparable(b)


def test_found_where_hf_efx_comes_last(marian, translate, run_python):
    program = f"""
        import json, sys
        from transformers import pipeline
        import hf_efx
        translate = pipeline("{TASK}", model=sys.argv[1], num_samples=2, max_new_tokens=5, device="cpu")
        print(json.dumps(translate("zwei hundert")))
    """
    result = json.loads(run_python(program, args=[marian[2]]).splitlines()[-1])
    assert_same([result], [translate("zwei hundert")])


def test_a_result_says_what_the_translator_does(marian, translate):
    options = TranslationOptions(**GIVEN)
    made = Translator(translate.model, marian[1], options)
    (one,) = made(["zwei hundert"], [text_id("zwei hundert")])
    assert translate("zwei hundert") == {
        "translation": one.translation,
        "uncertainty": one.uncertainties["bleuvar"],
        "uncertainties": one.uncertainties,
        "deferred": None,
        "samples": list(one.samples),
        "note": one.note,
    }
    empty = translate("  ")
    assert empty["translation"] == "" and math.isnan(empty["uncertainty"]) and empty["note"] == "empty source"


def test_lists_generators_and_data_sets(translate):
    single = [translate(source) for source in SOURCES]
    assert_same(translate(list(SOURCES)), single)
    assert_same(translate(list(SOURCES), batch_size=4), single)
    assert_same(translate(source for source in SOURCES), single)
    lazy = translate((source for source in SOURCES), batch_size=3)
    assert not isinstance(lazy, list)
    assert_same(lazy, single)
    data = Dataset.from_dict({"de": SOURCES})
    assert_same(translate(KeyDataset(data, "de"), batch_size=2), single)
    assert_same(translate(list(data["de"])[::-1], batch_size=9), single[::-1])
    assert translate([]) == []
    for wrong in (3, ["eins", None], {"text": "eins"}):
        with pytest.raises(ValueError, match="expected a text, a list or generator"):
            translate(wrong)


def test_without_samples_a_plain_translation(marian, translate):
    result = translate("zwei hundert", num_samples=0)
    usual = translate("zwei hundert")
    assert result["translation"] == usual["translation"] and result["samples"] == []
    beam_score = pytest.approx(usual["uncertainties"]["beam_score"])
    assert result["uncertainties"] == {"beam_score": beam_score} and result["uncertainty"] == beam_score
    assert translate("zwei hundert", num_samples=0, defer_above=-1.0)["deferred"] is True
    assert math.isnan(translate("", num_samples=0)["uncertainty"])
    own = pipeline(TASK, model=marian[0], tokenizer=marian[1], num_samples=0, device="cpu", max_new_tokens=5)
    assert own("zwei hundert")["samples"] == []


def test_a_call_s_arguments_go_before_those_of_the_start(marian, translate):
    assert len(translate("eins", num_samples=4)["samples"]) == 4
    assert len(translate("eins")["samples"]) == 2
    other = pipeline(TASK, model=str(marian[2]), device="cpu", num_beams=3, uncertainties=["epkl"], max_new_tokens=5)
    assert list(other("eins")["uncertainties"]) == ["epkl"]
    drawn = translate("eins", do_sample=True, temperature=3.0)
    assert drawn["samples"] != translate("eins")["samples"]
    assert drawn["translation"] == translate("eins")["translation"]
    assert translate("eins", choose="mbr")["translation"] in translate("eins")["samples"]


def test_normal_use_warns_of_nothing(marian, caplog):
    logging.getLogger("transformers").propagate = True
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error")
        translate = pipeline(TASK, model=str(marian[2]), device="cpu", batch_size=2)
        for _ in range(12):
            translate("")
        translate(["eins", "zwei"], max_new_tokens=3)
    assert caplog.messages == []


@pytest.fixture
def threshold(translate, marian):
    scores = [result["uncertainty"] for result in translate(["eins", "zwei", "drei", "acht", "neun"])]
    return choose_threshold(scores, 0.4, num_samples=2, model=weights_fingerprint(translate.model))


def test_what_is_deferred(translate, marian, threshold, monkeypatch):
    for above in (threshold, threshold.defer_above):
        for source in ("eins", "zwei", "drei"):
            result = translate(source, defer_above=above)
            assert result["deferred"] is (result["uncertainty"] > threshold.defer_above)
    assert translate("", defer_above=threshold)["deferred"] is False
    counted = []
    monkeypatch.setattr(
        "hf_efx.mc_dropout.options.weights_fingerprint",
        lambda model: counted.append(model) or weights_fingerprint(model),
    )
    translate(["eins", "zwei", "drei"], defer_above=threshold)
    assert len(counted) <= 1  # a hash of all weights, not taken for every text


def test_a_threshold_beside_the_model_is_read(translate, marian, threshold, tmp_path):
    translate.save_pretrained(tmp_path)
    assert not (tmp_path / "uncertainty.json").exists()
    threshold.save(tmp_path)
    again = pipeline(TASK, model=str(tmp_path), device="cpu", **GIVEN)
    assert again.threshold == threshold
    results = again(["eins", "zwei", "drei", "acht", "neun"])
    assert [r["deferred"] for r in results] == [r["uncertainty"] > threshold.defer_above for r in results]
    assert again("eins", defer_above=-1.0)["deferred"] is True
    assert again("eins", num_samples=0)["deferred"] is None
    with pytest.raises(ValueError, match="made with num_samples=2, not 3: choose one for this setting"):
        pipeline(TASK, model=str(tmp_path), device="cpu", num_samples=3)
    with pytest.raises(ValueError, match="made with num_samples=2, not 3"):
        again("eins", num_samples=3)
    with pytest.raises(ValueError, match="made with score='bleuvar', not 'beam_score'"):
        pipeline(TASK, model=str(tmp_path), device="cpu", uncertainties=["beam_score"], **GIVEN)
    again.save_pretrained(tmp_path / "copy")
    assert pipeline(TASK, model=str(tmp_path / "copy"), device="cpu", **GIVEN).threshold == threshold
    with torch.no_grad():
        next(iter(again.model.parameters())).add_(1)
    again.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made with model="):
        pipeline(TASK, model=str(tmp_path), device="cpu", **GIVEN)
    (tmp_path / "uncertainty.json").write_text("{}")
    with pytest.raises(ValueError, match="uncertainty.json holds no threshold"):
        pipeline(TASK, model=str(tmp_path), device="cpu", **GIVEN)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"num_samples": 1}, "num_samples=1: one sample has nothing to differ from"),
        ({"num_samples": -1}, "num_samples=-1"),
        ({"defer_above": math.nan}, "defer_above=nan: expected a finite number"),
        ({"defer_above": choose_threshold([0.1, 0.2], num_samples=5)}, "made with num_samples=5, not 2"),
        ({"num_return_sequences": 3}, "num_return_sequences=3: the samples of a source are num_samples"),
        ({"tgt_lang": "en"}, "tgt_lang='en': MarianTokenizer knows no languages"),
        ({"sites": ["none"]}, "sites: 'none' matches no module"),
    ],
    ids=["one", "negative", "nan", "other", "return", "language", "sites"],
)
def test_what_cannot_work_is_said_at_the_start_and_at_a_call(given, match, marian, translate, monkeypatch):
    with pytest.raises(ValueError, match=match):
        pipeline(TASK, model=marian[0], tokenizer=marian[1], device="cpu", **{**GIVEN, **given})
    monkeypatch.setattr(translate.model, "forward", None)
    with pytest.raises(ValueError, match=match):
        translate("eins", **given)


def test_what_is_saved_is_model_tokenizer_and_threshold(translate, threshold, marian, tmp_path):
    named = pipeline(TASK, model=str(marian[2]), device="cpu", defer_above=threshold, **GIVEN)
    named.save_pretrained(tmp_path)
    expected = {path.name for path in marian[2].iterdir()} | {"uncertainty.json"}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert "custom_pipelines" not in json.loads((tmp_path / "config.json").read_text())
    plain = pipeline(TASK, model=str(tmp_path), device="cpu", **GIVEN)
    assert_same([plain("eins") | {"deferred": None}], [translate("eins")])


def test_pushed_and_loaded_from_the_hub(hub, run_python, marian, translate, threshold, tmp_path):
    program = f"""
        import json, sys, hf_efx
        from transformers import pipeline
        given = dict(num_samples=2, max_new_tokens=5, device="cpu")
        translate = pipeline("{TASK}", model=sys.argv[1], **given)
        translate.push_to_hub("user/mc-dropout-pushed")
        translate.save_pretrained(sys.argv[2], push_to_hub=True, repo_id="user/mc-dropout-saved", private=True)
        for name in ("user/mc-dropout-pushed", "user/mc-dropout-saved"):
            again = pipeline("{TASK}", model=name, **given)
            print(json.dumps([again.threshold.defer_above, again("eins")]))
        from huggingface_hub import HfApi
        print(json.dumps(sorted(HfApi().list_repo_files("user/mc-dropout-saved"))))
    """
    translate.save_pretrained(tmp_path / "model")
    threshold.save(tmp_path / "model")
    out = run_python(program, env=hub.env, args=[tmp_path / "model", tmp_path / "saved"])
    *loaded, files = [json.loads(line) for line in out.splitlines() if line.startswith("[")]
    expected = translate("eins", defer_above=threshold)
    for above, result in loaded:
        assert above == threshold.defer_above
        assert_same([result], [expected])
    assert len(loaded) == 2 and "uncertainty.json" in files and not [name for name in files if name.endswith(".py")]
    assert (tmp_path / "saved" / "uncertainty.json").exists()


def test_a_model_object_and_ignored_parameters(marian):
    translate = pipeline(TASK, model=marian[0], tokenizer=marian[1], device="cpu", binary_output=True, **GIVEN)
    assert isinstance(translate, TranslationWithUncertaintyPipeline) and translate.threshold is None
    assert isinstance(translate("eins")["translation"], str)
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        TranslationWithUncertaintyPipeline(marian[0])


def test_a_decoder_only_model(tmp_path):
    model, tokenizer = built("gpt2", tmp_path)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    translate = pipeline(TASK, model=str(tmp_path), device="cpu", **GIVEN)
    assert type(translate.model).__name__ == "GPT2LMHeadModel"
    assert_same(translate(["eins", "zwei drei"], batch_size=2), [translate("eins"), translate("zwei drei")])
    tokenizer.pad_token = None
    named = pipeline(TASK, model=model, tokenizer=tokenizer, device="cpu", **GIVEN)
    assert_same(named(["eins", "zwei drei"], batch_size=2), translate(["eins", "zwei drei"]))
    assert tokenizer.pad_token is None
