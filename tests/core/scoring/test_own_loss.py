"""What is scored is what is trained: the mean of the scores is the model's own loss, or the model is refused."""

import pytest
import torch
import transformers
from tiny_models import HEADS, head_classes, tiny_batch, tiny_model

from hf_efx.core.scoring.scorer import _UNSHIFTED, Scorer, infer_task

# 48 of 490 that generic sizes don't make, by the reason.
UNBUILT = {
    "needs another package": "Gemma3nForConditionalGeneration LayoutLMv2ForTokenClassification "
    "LayoutLMv2ForSequenceClassification",
    "its config is that of the model around it": "DbrxForCausalLM Emu3ForCausalLM Llama4ForCausalLM "
    "MusicgenForCausalLM MusicgenMelodyForCausalLM Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM Qwen4ExpForCausalLM "
    "MusicFlamingoForConditionalGeneration",
    "its sizes hang together": "BambaForCausalLM CohereCompassForCausalLM CohereCompassTextForSequenceClassification "
    "Dots1ForCausalLM Dots3NoteForCausalLM Ernie4_5_MoeForCausalLM Gemma3nForCausalLM Gemma4AssistantForCausalLM "
    "Gemma4UnifiedAssistantForCausalLM GraniteMoeHybridForCausalLM Lfm2MoeForCausalLM NeoMMEForMaskedLM "
    "Nemotron3_5TranscribeForConditionalGeneration ReformerForMaskedLM ReformerForSequenceClassification "
    "ReformerModelWithLMHead ZambaForCausalLM ZambaForSequenceClassification Zamba2ForCausalLM "
    "Zamba2ForSequenceClassification xLSTMForCausalLM",
    "its first two layers don't make one": "JambaForCausalLM JambaForSequenceClassification KimiLinearForCausalLM "
    "Lfm3ForCausalLM RecurrentGemmaForCausalLM",
    "stays large": "BltForCausalLM Gemma4ForCausalLM Gemma4ForConditionalGeneration LongcatFlashForCausalLM "
    "PerceiverForMaskedLM PerceiverForSequenceClassification VibeVoiceAsrForConditionalGeneration",
    "takes more than tokens": "BrosForTokenClassification GitForCausalLM VoxtralRealtimeForConditionalGeneration",
}
REFUSED = {  # computes another loss than it is named after
    "FSMTForConditionalGeneration": "DataCollatorForSeq2Seq",  # shifts the input where it gets labels alone
    "ProphetNetForCausalLM": "weights or moves its labels",  # predicts several tokens ahead
    "ProphetNetForConditionalGeneration": "weights or moves its labels",
}


def _check(head, name, model_type, **options):
    model, batch = tiny_model(head, name, model_type, **options), tiny_batch(head)
    if options.get("problem_type") == "regression" or options.get("num_labels") == 1:
        batch["labels"] = torch.tensor([0.5, -1.0, 2.0])
    with torch.no_grad():
        own = model(**batch).loss
    model.config.problem_type = options.get("problem_type")
    if name in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name]):
            Scorer(("loss", "count"))(model, batch)
        return
    scores = Scorer(("loss", "count"))(model, batch)
    mean = (scores["loss"] * scores["count"]).sum() / scores["count"].sum()
    assert mean.item() == pytest.approx(own.item(), rel=1e-5), name
    assert getattr(model.config, "problem_type", None) == options.get("problem_type")  # own losses set it


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("head", HEADS)
def test_every_class_under_a_head(head):
    unbuilt = {name for names in UNBUILT.values() for name in names.split()}
    wrong, built = [], 0
    classes = head_classes(head)
    for name, model_type in classes.items():
        try:
            with torch.no_grad():
                tiny_model(head, name, model_type)(**tiny_batch(head))
        except Exception as error:
            if name not in unbuilt:
                wrong.append(f"{name}: can't be built: {type(error).__name__}: {str(error)[:120]}")
            continue
        built += 1
        try:
            _check(head, name, model_type)
        except (Exception, pytest.fail.Exception) as error:
            wrong.append(f"{name}: {type(error).__name__}: {error}")
    assert not wrong, "\n".join(wrong)
    assert built >= 0.8 * len(classes)


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ("CAUSAL_LM", "LlamaForCausalLM"),
        ("CAUSAL_LM", "MixtralForCausalLM"),
        ("CAUSAL_LM", "BartForCausalLM"),
        ("CAUSAL_LM", "XLNetLMHeadModel"),
        ("CAUSAL_LM", "XLMWithLMHeadModel"),
        ("CAUSAL_LM", "ProphetNetForCausalLM"),
        ("SEQ_TO_SEQ_CAUSAL_LM", "T5ForConditionalGeneration"),
        ("SEQ_TO_SEQ_CAUSAL_LM", "FSMTForConditionalGeneration"),
        ("SEQ_TO_SEQ_CAUSAL_LM", "EncoderDecoderModel"),
        ("SEQ_TO_SEQ_CAUSAL_LM", "Qwen2AudioForConditionalGeneration"),  # no encoder-decoder, for all its head's name
        ("MASKED_LM", "BertForMaskedLM"),
        ("TOKEN_CLASSIFICATION", "BertForTokenClassification"),
        ("SEQUENCE_CLASSIFICATION", "BartForSequenceClassification"),
        ("SEQUENCE_CLASSIFICATION", "GPT2ForSequenceClassification"),
    ],
)
@pytest.mark.filterwarnings("ignore:Version v4.12.0 introduces:FutureWarning")  # any EncoderDecoderModel with labels
def test_the_mean_score_is_the_models_own_loss(head, name):
    _check(head, name, head_classes(head)[name])


def test_regression_too():
    _check("SEQUENCE_CLASSIFICATION", "BertForSequenceClassification", "bert", num_labels=1)
    _check("SEQUENCE_CLASSIFICATION", "BertForSequenceClassification", "bert", num_labels=1, problem_type="regression")


def test_unshifted_decoders_are_all_there():
    assert _UNSHIFTED <= set(head_classes("CAUSAL_LM"))
    assert infer_task(tiny_model("CAUSAL_LM", "MarianForCausalLM", "marian")) == "masked"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_loss_with_other_terms_is_refused_and_a_named_task_says_so(dtype, caplog):
    model, batch = tiny_model("CAUSAL_LM", "MixtralForCausalLM", "mixtral", output_router_logits=True), tiny_batch("")
    model.to(dtype)
    with pytest.raises(ValueError, match=r"MixtralForCausalLM computes a loss .*output_router_logits=False.*task='ca"):
        Scorer()(model, batch)
    assert Scorer(task="causal")(model, batch)["loss"].shape == (3,)  # asked for by name
    assert "task='causal' was named, and the plain loss is scored: MixtralForCausalLM computes a loss" in caplog.text
    caplog.clear()
    model.config.output_router_logits = False
    for task in (None, "causal"):
        assert Scorer(task=task)(model, batch)["loss"].shape == (3,)
    assert not caplog.text


class Doubled(transformers.LlamaForCausalLM):
    """A loss of one's own under the head of another."""

    def forward(self, input_ids, attention_mask=None, labels=None, **kwargs):  # pyright: ignore
        outputs = super().forward(input_ids, attention_mask, **kwargs)
        if labels is not None:
            outputs.loss = 2 * super().forward(input_ids, attention_mask, labels=labels).loss
        return outputs


class Unlabelled(transformers.LlamaForCausalLM):
    def forward(self, input_ids, attention_mask=None):  # pyright: ignore
        return super().forward(input_ids, attention_mask)


@pytest.mark.parametrize(("cls", "message"), [(Doubled, "Doubled computes a loss"), (Unlabelled, "takes no 'labels'")])
def test_a_loss_of_ones_own_is_not_taken_for_the_heads(cls, message):
    model = cls(tiny_model("CAUSAL_LM", "LlamaForCausalLM", "llama").config).eval()
    with pytest.raises(ValueError, match=message):
        Scorer()(model, tiny_batch(""))
    Scorer(task="causal")(model, tiny_batch(""))


def test_smoothing_as_the_trainer_does_it_or_not_at_all():
    batch = tiny_batch("")
    bart = tiny_model("CAUSAL_LM", "BartForCausalLM", "bart")
    with pytest.raises(ValueError, match="label_smoothing=0.1: .*moves the labels of a BartForCausalLM, whose own"):
        Scorer(label_smoothing=0.1)(bart, batch)
    with pytest.raises(ValueError, match="leaves the labels of a Mine, whose own loss moves them"):
        Scorer(label_smoothing=0.1)(Mine(tiny_model("CAUSAL_LM", "LlamaForCausalLM", "llama").config), batch)


class Mine(transformers.LlamaForCausalLM):
    """The Trainer knows classes by their names alone."""


def test_float_labels_of_classes_are_refused():
    model = tiny_model("SEQUENCE_CLASSIFICATION", "BertForSequenceClassification", "bert")
    with pytest.raises(ValueError, match="labels that are whole numbers, but they are torch.float32"):
        Scorer()(model, tiny_batch("") | {"labels": torch.tensor([0.0, 1.0, 2.0])})


def test_the_check_is_made_once_for_a_scorer_and_a_model():
    model, batch, calls = tiny_model("CAUSAL_LM", "LlamaForCausalLM", "llama"), tiny_batch(""), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    scorer = Scorer()
    scorer(model, batch)
    assert len(calls) == 3  # with labels, without, and the scores
    scorer(model, batch)
    assert len(calls) == 4
