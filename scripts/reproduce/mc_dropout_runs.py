"""The runs of the study of translation uncertainty: training a model, translating and sampling, each in a process."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from study_jobs import Job

SAMPLES = (2, 5, 10, 20, 30)  # the first so many of the largest
MAIN = 10
TEXT_SCORES = ("bleuvar", "lexical_similarity", "chrf")
ANSWER_SCORES = ("beam_score", "sequence_probability")
TOKEN_SCORES = ("token_entropy", "mutual_information", "reverse_mutual_information", "epkl")
# Of one seed and half of the sources, BLEUVar of MAIN samples each.
SWEEPS: dict[str, dict[str, Any]] = {
    "masks by position": {},
    "masks by sequence": {"masks": "sequence"},
    "samples by beam search (4)": {"num_beams": 4},
    **{f"dropout {rate}": {"rate": rate} for rate in (0.05, 0.2, 0.3)},
    "decoder's dropout alone": {"sites": ["decoder"]},
    "encoder's dropout alone": {"sites": ["encoder"]},
    **{
        f"no dropout, temperature {t}": {"sites": [], "do_sample": True, "temperature": t, "top_k": 0}
        for t in (0.3, 0.6, 1.0)
    },
}


def study_pairs(source: str | None) -> tuple[Any, Any]:
    """Test pairs with a Dutch source of the same English (four words and more of strings), and validation pairs."""
    from hf_efx.core.data.text_pairs import load_pairs

    pairs = load_pairs(source, "de", "en")
    least = 1 if source is None else 4
    test = pairs["test"].filter(lambda row: bool((row["nl"] or "").strip()) and len(row["target"].split()) >= least)
    return test, pairs["validation"]


def run(job: Job, queue: Any, **common: Any) -> dict[str, Any]:
    """Runs a job in this process, on one thread, and returns its row."""
    import datasets
    import torch
    import transformers

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    kind, _, name = job.configuration.partition(": ")
    start = time.process_time()
    row = {"train": train, "scores": scores, "sweep": sweep}[kind](job, name, **common)
    queue.put(job.steps)
    return {**row, "seconds": time.process_time() - start}


def train(job: Job, _: str, models: str, training: Sequence[str], **__: Any) -> dict[str, Any]:
    """Trains the seed's model, or goes on where it was cut off."""
    from hf_efx.programs.train_marian import main

    folder = Path(models, f"seed{job.seed}")
    if not (folder / "model.safetensors").exists():
        resume = ["--resume_from_checkpoint", "true"] if any(folder.glob("checkpoint-*")) else []
        if main([*training, "--output_dir", str(folder), "--seed", str(job.seed), *resume]):
            raise RuntimeError(f"{folder}: the training failed")
    return {}


def _load(models: str, seed: int) -> tuple[Any, Any]:
    from transformers import MarianMTModel, MarianTokenizer

    folder = Path(models, f"seed{seed}")
    return MarianMTModel.from_pretrained(folder), MarianTokenizer.from_pretrained(folder)


def _sources(test: Any) -> Any:
    """German sources, then Dutch ones, with ids that say which."""
    from datasets import Dataset

    count = len(test)
    ids = [2 * i for i in range(count)] + [2 * i + 1 for i in range(count)]
    return Dataset.from_dict({"example_id": ids, "source": [*test["source"], *test["nl"]]})


def scores(job: Job, _: str, models: str, data: str | None, limit: int | None, **__: Any) -> dict[str, Any]:
    """All scores of the test sources, BLEUVar for several numbers of samples, and of validation sources."""
    from hf_efx.mc_dropout import UNCERTAINTIES, score_translations

    test, validation = study_pairs(data)
    test, validation = (part.select(range(min(limit or 1200, len(part)))) for part in (test, validation))
    model, tokenizer = _load(models, job.seed)
    folder = Path(models, f"scores-seed{job.seed}")
    common: dict[str, Any] = {"seed": job.seed, "truncation": True, "progress": False}
    names = [*TEXT_SCORES, *ANSWER_SCORES, *TOKEN_SCORES]
    most = max(SAMPLES) if limit is None else MAIN
    sources = _sources(test)
    whole = score_translations(
        model, tokenizer, sources, num_samples=MAIN, uncertainties=names, output_dir=folder / "all", **common
    )
    many = score_translations(
        model,
        tokenizer,
        sources,
        num_samples=most,
        uncertainties=["bleuvar"],
        output_dir=folder / "samples",
        **common,
    )
    known = score_translations(
        model,
        tokenizer,
        validation.select_columns(["source"]),
        num_samples=MAIN,
        output_dir=folder / "known",
        **common,
    )
    samples = many["samples"][:]
    by_number = {str(n): UNCERTAINTIES["bleuvar"]([s[:n] for s in samples]).tolist() for n in SAMPLES if n <= most}
    same = sum(list(a) == list(b[:MAIN]) for a, b in zip(whole["samples"][:], samples, strict=True))
    return {
        "answers": whole["translation"][:],
        "notes": whole["note"][:],
        "scores": {name: whole[name][:] for name in names},
        "bleuvar": by_number,
        "repeated": same / len(samples),
        "validation": known["bleuvar"][:],
    }


def sweep(job: Job, name: str, models: str, data: str | None, limit: int | None, **__: Any) -> dict[str, Any]:
    """BLEUVar of every second source of one seed, sampled in another way."""
    from hf_efx.mc_dropout import score_translations

    test = study_pairs(data)[0]
    test = test.select(range(0, min(limit or len(test), len(test)), 2))
    model, tokenizer = _load(models, job.seed)
    settings = dict(SWEEPS[name])
    set_dropout(model, settings.pop("rate", model.config.dropout))
    table = score_translations(
        model,
        tokenizer,
        _sources(test),
        num_samples=MAIN,
        uncertainties=["bleuvar", "beam_score"],
        seed=job.seed,
        truncation=True,
        progress=False,
        output_dir=Path(models, f"sweep-seed{job.seed}", "".join(c if c.isalnum() else "-" for c in name)),
        **settings,
    )
    return {"bleuvar": table["bleuvar"][:], "answers": table["translation"][:]}


def set_dropout(model: Any, rate: float) -> None:
    """Gives every layer of a Marian model another dropout rate; the weights stay."""
    for module in model.modules():
        if isinstance(vars(module).get("dropout"), float):
            module.dropout = rate
