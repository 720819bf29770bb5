"""The text parts of the RHO-LOSS study: a pretrained encoder, which tells sources apart, and a small causal model."""

import json
import math
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from noisy_images import NOISE
from selection_runs import arguments, clock_and_curve, train, training_flops
from study_jobs import Job
from torch import nn

ENCODER: dict[str, dict[str, Any]] = {
    "uniform": {"selection_ratio": 1.0},
    "rho_loss": {"selection_ratio": 0.25},
    "loss": {"selection_ratio": 0.25, "selection": "loss"},
}
LM: dict[str, dict[str, Any]] = {
    "uniform": {"selection_ratio": 1.0},
    "rho_loss": {"selection_ratio": 0.25},
    "rho_loss by token": {"selection_ratio": 0.6, "granularity": "token"},
    "loss": {"selection_ratio": 0.25, "selection": "loss"},
}
TOKENS, EXAMPLES, TESTED = 64, 6000, 500  # of an example; each for training and holdout; for the accuracy
BUCKETS = 2**16  # hashed words of the encoder's irreducible-loss model
LM_TOKENS, LM_EXAMPLES, LM_TESTED, LM_BATCH = 96, 8000, 300, 16
LM_MODEL: dict[str, Any] = {"n_layer": 2, "n_embd": 96, "n_head": 4, "n_positions": LM_TOKENS}


def _texts(source: str | None, count: int, minimum: int = 40) -> tuple[list[str], list[str]]:
    """Texts and their sources, shuffled; at most `count`."""
    from hf_efx.core.data.text_data import load_text

    data = load_text(source)["train"]
    texts = data["text"][:]
    sources = data["source"][:] if "source" in data.column_names else [text.split()[0] for text in texts]
    order = [i for i in np.random.default_rng(0).permutation(len(texts)).tolist() if len(texts[i]) >= minimum]
    return [texts[i] for i in order[:count]], [sources[i] for i in order[:count]]


class WordsModel(nn.Module):
    """A bag of hashed words and pairs of words, for irreducible losses at next to no cost."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(BUCKETS, classes, mode="sum", padding_idx=0)
        nn.init.zeros_(self.bag.weight)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Logits [n, classes], and the mean cross-entropy where there are labels."""
        ids = input_ids * attention_mask
        pairs = (ids[:, :-1] * 31_337 + ids[:, 1:]) % (BUCKETS - 1) + 1
        pairs = pairs * (attention_mask[:, :-1] * attention_mask[:, 1:])
        words = ids % (BUCKETS - 1) + (ids > 0)
        logits = self.bag(torch.cat([words, pairs], 1)) / attention_mask.sum(1, keepdim=True).sqrt()
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _padded(tokens: list[list[int]], pad: int, fill: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask [n, the longest]."""
    width = max(map(len, tokens))
    ids = torch.tensor([row + [pad if fill is None else fill] * (width - len(row)) for row in tokens])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in tokens])


def run_encoder(
    job: Job, queue: Any, text: str | None, encoder: str, tables: str, every: int, **_: Any
) -> dict[str, Any]:
    """Fine-tunes a pretrained encoder to tell sources of paragraphs apart, 10% of the labels redrawn."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

    from hf_efx.rho_loss.trainer import RHOLossTrainer

    name = job.configuration.partition(": ")[2]
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    texts, sources = _texts(text, 2 * EXAMPLES + TESTED)
    kept = [source for source, _ in Counter(sources).most_common(13)]
    rows = [(t, kept.index(s)) for t, s in zip(texts, sources, strict=True) if s in kept]
    ids = tokenizer([t for t, _ in rows], truncation=True, max_length=TOKENS)["input_ids"]
    clean = np.array([label for _, label in rows])
    test = slice(0, min(TESTED, len(rows) // 5))
    generator = np.random.default_rng(job.seed)
    noisy = np.where(generator.random(len(clean)) < NOISE, generator.integers(0, len(kept), len(clean)), clean)
    places = generator.permutation(np.arange(test.stop, len(rows)))

    def part(chosen: np.ndarray) -> Dataset:
        columns = {"example_id": chosen, "input_ids": [ids[i] for i in chosen], "labels": noisy[chosen]}
        columns["attention_mask"] = [[1] * len(row) for row in columns["input_ids"]]
        return Dataset.from_dict({**columns, "corrupted": noisy[chosen] != clean[chosen]})

    target, holdout = part(places[::2]), part(places[1::2])
    collator = DataCollatorWithPadding(tokenizer)
    table, cost = None, 0.0
    if name == "rho_loss":
        table, cost = _words_table(holdout, target, collator, len(kept), job.seed, Path(tables, f"words-{job.seed}"))
    torch.manual_seed(job.seed)
    model = AutoModelForSequenceClassification.from_pretrained(encoder, num_labels=len(kept))
    test_batches = [
        (*_padded(ids[i : i + 50], tokenizer.pad_token_id or 0), clean[i : i + 50]) for i in range(0, test.stop, 50)
    ]

    def evaluate(m: Any) -> float:
        training = m.training
        m.eval()
        with torch.no_grad():
            right = [
                (m(input_ids=x, attention_mask=mask).logits.argmax(1).numpy() == y).sum()
                for x, mask, y in test_batches
            ]
        m.train(training)
        return float(sum(right) / test.stop)

    # A pretrained encoder's usual rate; eight at a time, so that two cores are enough.
    options = {"learning_rate": 1e-4, "per_device_train_batch_size": 8, "scoring_batch_size": 16, **ENCODER[name]}
    watch = clock_and_curve(evaluate, max(min(10, every), 1), queue)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, job.seed, job.steps, corrupted_column="corrupted", **options)
        trainer = RHOLossTrainer(
            model, args, train_dataset=target, data_collator=collator, irreducible_losses=table, callbacks=[watch]
        )
        row = train(trainer, watch, folder)
    batch = collator([{k: target[i][k] for k in ("input_ids", "attention_mask", "labels")} for i in range(8)])
    drawn = 0 if args.selection_ratio == 1 else round(8 / args.selection_ratio)
    best = max(figure for _, _, figure in row["curve"])
    figures = {"best": best, "final": row["curve"][-1][2], "steps": job.steps, "table_seconds": cost}
    return {**figures, "flops_per_step": training_flops(model, dict(batch), drawn, None), **row}


def _words_table(holdout: Any, target: Any, collator: Any, classes: int, seed: int, folder: Path) -> tuple[Any, float]:
    """Trains the bag of words on the holdout and makes the table."""
    from hf_efx.rho_loss.irreducible import compute_irreducible_losses
    from hf_efx.rho_loss.irreducible_table import load_irreducible_losses

    figures = folder.with_suffix(".json")
    if figures.exists():
        return load_irreducible_losses(folder), json.loads(figures.read_text())["seconds"]
    shutil.rmtree(folder, ignore_errors=True)
    start = time.process_time()
    torch.manual_seed(100 + seed)
    model = WordsModel(classes)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    columns = holdout.remove_columns(["example_id", "corrupted"])
    order = np.random.default_rng(seed)
    epochs, size = 4, 128
    total, step = epochs * -(-len(columns) // size), 0
    for _ in range(epochs):
        for rows in np.array_split(order.permutation(len(columns)), -(-len(columns) // size)):
            for group in optimizer.param_groups:
                group["lr"] = 0.02 * (1 - step / total)
            batch = collator([columns[int(i)] for i in rows])
            model(**batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
    table = compute_irreducible_losses(
        model, target, data_collator=collator, task="classification", batch_size=128,
        fingerprint_columns=["input_ids", "labels"], output_dir=folder,
    )  # fmt: skip
    seconds = time.process_time() - start
    figures.write_text(json.dumps({"seconds": seconds}))
    return table, seconds


def run_lm(job: Job, queue: Any, text: str | None, tables: str, every: int, **_: Any) -> dict[str, Any]:
    """Trains a small byte-level GPT-2 on texts of which a tenth is random bytes; the loss on clean text counts."""
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel

    from hf_efx.core.data.text_data import TextCollator, byte_tokenizer
    from hf_efx.rho_loss.trainer import RHOLossTrainer

    name = job.configuration.partition(": ")[2]
    tokenizer = byte_tokenizer()
    eos: Any = tokenizer.eos_token_id
    texts, _sources = _texts(text, 2 * LM_EXAMPLES + LM_TESTED, LM_TOKENS)
    ids = [list(value.encode()[: LM_TOKENS - 1]) + [eos] for value in texts]
    generator = np.random.default_rng(job.seed)
    tested = min(LM_TESTED, len(ids) // 5)
    corrupted = generator.random(len(ids)) < NOISE
    noisy = [generator.integers(32, 127, len(r)).tolist() if bad else r for r, bad in zip(ids, corrupted, strict=True)]
    places = generator.permutation(np.arange(tested, len(ids)))

    def part(chosen: np.ndarray) -> Dataset:
        columns = {"example_id": chosen, "input_ids": [noisy[i] for i in chosen], "corrupted": corrupted[chosen]}
        return Dataset.from_dict(columns)

    def new_model(seed: int) -> Any:
        torch.manual_seed(seed)
        dropouts: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tokenizer), bos_token_id=eos, eos_token_id=eos, **LM_MODEL, **dropouts)
        )

    target, holdout = part(places[::2]), part(places[1::2])
    collator = TextCollator(eos)
    options = {"learning_rate": 2e-3, "per_device_train_batch_size": LM_BATCH, **LM[name]}
    table, cost = None, 0.0
    granularity = options.get("granularity", "example")
    if name.startswith("rho_loss"):
        folder = Path(tables, f"lm-{granularity}-{job.seed}")
        table, cost = _lm_table(new_model(100 + job.seed), holdout, target, collator, granularity, job, folder)
    model = new_model(job.seed)
    batches = [collator([{"input_ids": row} for row in ids[i : i + 50]]) for i in range(0, tested, 50)]

    def evaluate(m: Any) -> float:
        training = m.training
        m.eval()
        with torch.no_grad():
            losses = [float(m(**batch).loss) * int((batch["labels"] != -100).sum()) for batch in batches]
        m.train(training)
        return sum(losses) / sum(int((batch["labels"] != -100).sum()) for batch in batches)

    watch = clock_and_curve(evaluate, every, queue)
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(folder, job.seed, job.steps, corrupted_column="corrupted", **options)
        trainer = RHOLossTrainer(
            model, args, train_dataset=target, data_collator=collator, irreducible_losses=table, callbacks=[watch]
        )
        row = train(trainer, watch, folder)
    batch = dict(collator([{"input_ids": target[i]["input_ids"]} for i in range(LM_BATCH)]))
    drawn = 0 if args.selection_ratio == 1 else LM_BATCH
    if drawn and granularity == "example":
        drawn = round(LM_BATCH / args.selection_ratio)
    best = min(figure for _, _, figure in row["curve"])
    figures = {"best": best, "final": row["curve"][-1][2], "steps": job.steps, "table_seconds": cost}
    return {**figures, "flops_per_step": training_flops(model, batch, drawn, None), **row}


def _lm_table(
    model: Any, holdout: Any, target: Any, collator: Any, granularity: Any, job: Job, folder: Path
) -> tuple[Any, float]:
    """Trains the same small model on the holdout, its rate falling to 0, and makes the table."""
    from hf_efx.rho_loss.irreducible import compute_irreducible_losses
    from hf_efx.rho_loss.irreducible_table import load_irreducible_losses
    from hf_efx.rho_loss.trainer import RHOLossTrainer

    figures = folder.with_suffix(".json")
    if figures.exists():
        return load_irreducible_losses(folder), json.loads(figures.read_text())["seconds"]
    shutil.rmtree(folder, ignore_errors=True)
    trained = folder.with_name(f"lm-model-{job.seed}")  # one for both granularities
    start = time.process_time()
    if not (trained / "seconds.json").exists():
        with tempfile.TemporaryDirectory() as temporary:
            args = arguments(
                temporary, 100 + job.seed, math.ceil(1.5 * job.steps), learning_rate=4e-3, lr_scheduler_type="linear",
                selection_ratio=1.0, per_device_train_batch_size=2 * LM_BATCH, report_selection=False,
            )  # fmt: skip
            trainer = RHOLossTrainer(model, args, train_dataset=holdout, data_collator=collator)
            trainer.train()
        model.save_pretrained(trained)
        (trained / "seconds.json").write_text(json.dumps(time.process_time() - start))
        start = time.process_time()
    model = type(model).from_pretrained(trained)
    table = compute_irreducible_losses(
        model, target, data_collator=collator, batch_size=64, granularity=granularity,
        fingerprint_columns=["input_ids"], output_dir=folder, remove_unused_columns=True,
    )  # fmt: skip
    seconds = json.loads((trained / "seconds.json").read_text()) + time.process_time() - start
    figures.write_text(json.dumps({"seconds": seconds}))
    return table, seconds
