"""Prunability as a measurement of the library `evaluate`; loads offline from its folder.

measurement = evaluate.load("hf_efx/prunability/prunability_measurement")
measurement.compute(data=["a text that the model was trained on", ...], model="you/model")
"""

import datasets
import evaluate
import transformers

import hf_efx

_DESCRIPTION = """
The smallest fraction of a model's weights that can be kept, pruning by magnitude without retraining, while its loss on
training data rises by no more than a tolerance. Of models with one training loss a lower value predicts better
generalization.
"""

_KWARGS_DESCRIPTION = """
Args:
    data (list of str): texts that the model was trained on.
    model (str or PreTrainedModel): a checkpoint (folder or Hub name), or a model.
    labels (list of int, optional): classes of the texts; then the model is a sequence classifier, else a causal model.
    tokenizer (optional): the tokenizer; without it the checkpoint's.
    max_length (int): tokens of a text at most, 128.
    **options: of hf_efx.measure_prunability: tolerance, criterion, scope, tolerance_mode, exhaustive, ...
Returns:
    prunability (float), interval (95%, over texts), loss, bound, evaluations, weights, kept (share of each tensor).
"""

_CITATION = """
@article{kuhn2021prunability,
  title = {Robustness to Pruning Predicts Generalization in Deep Neural Networks},
  author = {Kuhn, Lorenz and Lyle, Clare and Gomez, Aidan N. and Rothfuss, Jonas and Gal, Yarin},
  journal = {arXiv preprint arXiv:2103.06002},
  year = {2021}
}
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PrunabilityMeasurement(evaluate.Measurement):
    """Prunability of a model on texts."""

    def _info(self):
        return evaluate.MeasurementInfo(
            module_type="measurement",
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"data": datasets.Value("string")}),
            reference_urls=["https://arxiv.org/abs/2103.06002"],
        )

    def _compute(self, data, model, labels=None, tokenizer=None, max_length=128, **options):
        if labels is not None and len(labels) != len(data):
            raise ValueError(f"labels has {len(labels)} entries, data {len(data)}: give one for each text")
        if isinstance(model, str):
            kind = (
                transformers.AutoModelForCausalLM
                if labels is None
                else transformers.AutoModelForSequenceClassification
            )
            tokenizer = tokenizer or transformers.AutoTokenizer.from_pretrained(model)
            model = kind.from_pretrained(model)
        if tokenizer is None:
            raise ValueError("tokenizer is missing: a model that is no checkpoint's name needs one beside it")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        encoded = tokenizer(list(data), truncation=True, max_length=max_length, padding=True, return_tensors="pt")
        if labels is None:
            targets = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100).tolist()
        else:
            targets = list(labels)
        names = [name for name in encoded if name in ("input_ids", "attention_mask", "token_type_ids")]
        rows = [
            {**{name: encoded[name][i].tolist() for name in names}, "labels": targets[i]} for i in range(len(targets))
        ]
        result = hf_efx.measure_prunability(model, rows, **options)
        return {
            "prunability": result.fraction,
            "interval": result.interval,
            "loss": result.loss,
            "bound": result.bound,
            "evaluations": result.evaluations,
            "weights": result.weights,
            "kept": result.kept,
        }
