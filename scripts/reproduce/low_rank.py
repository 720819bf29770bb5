"""Low-rank training of a byte-level GPT-2: dense, He, spectral and spectral-ones factors, decay on factors, warm-up.

Follows Kamalakara et al. 2022, arXiv 2209.13569, at a size that two CPU cores train in minutes: all configurations see
the same batches in the same order from the same dense initial weights.

    python scripts/reproduce/low_rank.py --data english_paragraphs.tsv.gz         # as published; any text of load_text
    python scripts/reproduce/low_rank.py                                          # the standard library's own text
    python scripts/reproduce/low_rank.py --quick                                  # a smoke run of a minute

A killed study goes on where it stopped. Results: scripts/reproduce/results/low_rank.json and low_rank.png.
"""

import argparse
import math
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from study_jobs import Job, run_all

BLOCK, BATCH, EVALUATION_BLOCKS = 128, 8, 1024
MODEL: dict[str, Any] = {"n_layer": 2, "n_embd": 128, "n_head": 4, "n_positions": BLOCK}
LEARNING_RATE = 1e-3
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Configuration:
    """One line of the study: how layers are factorised, and options of the run (LowRankArguments)."""

    low_rank: Mapping[str, Any] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    warmup_share: float = 0.0  # of all steps that are trained dense before the layers are factorised


SPECTRAL = {"rank": 0.25}
CONFIGURATIONS = {
    "dense": Configuration(),
    "he": Configuration({**SPECTRAL, "init": "he"}),
    "spectral": Configuration(SPECTRAL),
    "spectral ones": Configuration({**SPECTRAL, "init": "spectral_ones"}),
    "spectral ones rms": Configuration({**SPECTRAL, "init": "spectral_ones", "spectral_ones_scale": "rms"}),
    "spectral + frobenius decay": Configuration(SPECTRAL, {"factor_decay": 0.1}),
    "spectral + l2": Configuration(SPECTRAL, {"factor_decay": 0.1, "factor_decay_kind": "l2"}),
    "warm-up": Configuration(SPECTRAL, warmup_share=0.25),
}
LONG = ("dense", "he", "spectral")  # and the best of the rest
# What do the optimiser's state, the rate at the switch, and stronger decay do? One seed, the long budget.
RATE = {"learning_rate": 3e-3}
LOOK = {
    "warm-up, reset": Configuration(SPECTRAL, {"switch_optimizer_state": "reset"}, 0.25),
    "warm-up, half rate": Configuration(SPECTRAL, {"switch_learning_rate_scale": 0.5}, 0.25),
    "spectral + frobenius decay 1": Configuration(SPECTRAL, {"factor_decay": 1.0}),
    "spectral + l2 1": Configuration(SPECTRAL, {"factor_decay": 1.0, "factor_decay_kind": "l2"}),
    "spectral, rate 3e-3": Configuration(SPECTRAL, RATE),
    "spectral + frobenius decay 1, rate 3e-3": Configuration(SPECTRAL, {"factor_decay": 1.0, **RATE}),
}


def _job(name: str, configuration: Configuration, steps: int, seed: int) -> Job:
    return Job(name, seed, steps, {"configuration": configuration})


def run(job: Job, queue: Any, data: str) -> dict[str, Any]:
    """Trains one configuration in this process, on one thread, and returns its row."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    import transformers
    from datasets import load_from_disk
    from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, set_seed

    from hf_efx import LowRankArguments, LowRankConfig, LowRankTrainer, low_rank_report
    from hf_efx.core.data.text_data import TextCollator, byte_tokenizer

    transformers.logging.set_verbosity_error()
    configuration: Configuration = job.options["configuration"]

    class Steps(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            queue.put(1)

    tokenizer = byte_tokenizer()
    eos: Any = tokenizer.eos_token_id
    set_seed(job.seed)
    dropouts: dict[str, Any] = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes: dict[str, Any] = {"vocab_size": len(tokenizer), "bos_token_id": eos, "eos_token_id": eos}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **MODEL, **dropouts))
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {
            "max_steps": job.steps,
            "learning_rate": LEARNING_RATE,
            "lr_scheduler_type": "constant",
            "dense_warmup_steps": round(configuration.warmup_share * job.steps),
            **configuration.arguments,
        }
        arguments = LowRankArguments(
            folder,
            per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=64,
            weight_decay=0.0,
            logging_steps=max(job.steps // 20, 1),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=job.seed,
            data_seed=job.seed,
            model_card=False,
            **options,
        )
        trainer = LowRankTrainer(
            model,
            arguments,
            train_dataset=load_from_disk(f"{data}/train"),
            eval_dataset=load_from_disk(f"{data}/validation"),
            data_collator=TextCollator(eos),
            callbacks=[Steps()],
            low_rank_config=LowRankConfig(**configuration.low_rank) if configuration.low_rank else None,
        )
        # The Trainer prints its logs where the bar is.
        trainer.remove_callback(transformers.PrinterCallback)
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        loss = trainer.evaluate()["eval_loss"]
    row = {
        "steps": job.steps,
        "loss": loss,
        "perplexity": math.exp(loss),
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": seconds,
        "curve": [[log["step"], log["loss"]] for log in trainer.state.log_history if "loss" in log],
    }
    if configuration.low_rank:
        layers = low_rank_report(model).layers
        row["effective_rank_share"] = sum(layer.effective_rank / layer.rank for layer in layers) / len(layers)
        row["frobenius_norm"] = sum(layer.frobenius_norm for layer in layers) / len(layers)
    return row


def prepare(source: str | None, folder: Path) -> dict[str, Any]:
    """Tokenises the text once for all runs; returns its name and fingerprint."""
    from hf_efx.core.data.text_data import byte_tokenizer, content_fingerprint, load_text, tokenize_blocks

    text = load_text(source)
    for split in ("train", "validation"):
        blocks = tokenize_blocks(text[split], byte_tokenizer(), BLOCK)
        if split == "validation":
            blocks = blocks.shuffle(seed=0).select(range(min(EVALUATION_BLOCKS, len(blocks))))
        blocks.save_to_disk(str(folder / split))
    name = Path(source).name if source else "standard library text of this Python"
    return {"name": name, "fingerprint": content_fingerprint(text["train"])}


def gap_closed(rows: Mapping[tuple[str, int], Any], name: str, budget: str, seeds: Sequence[int]) -> list[float]:
    """Share of the He-to-dense gap in perplexity that a configuration closes, for each seed."""

    def perplexity(configuration: str, seed: int) -> float:
        return rows[f"{configuration} ({budget})", seed]["perplexity"]

    return [
        (perplexity("he", s) - perplexity(name, s)) / (perplexity("he", s) - perplexity("dense", s)) for s in seeds
    ]


def make_claims(rows: Mapping[tuple[str, int], Any], seeds: Sequence[int], best: str) -> list[dict[str, Any]]:
    """The bars of the study."""
    from hf_efx.core.results.evidence import claim

    def values(name: str, budget: str) -> list[float]:
        return [rows[f"{name} ({budget})", s]["perplexity"] for s in seeds]

    claims = []
    for budget, names in (("short", list(CONFIGURATIONS)), ("long", [*LONG, best])):
        he, dense = values("he", budget), values("dense", budget)
        rest = {n: values(n, budget) for n in names if n not in ("he", "dense")}
        worst, top = (pick(rest, key=lambda n: sum(rest[n])) for pick in (max, min))
        claims += [
            claim(
                f"{budget} budget: dense is best; its perplexity over that of the next ({top})",
                source="ours",
                bar=1.0,
                direction="at_most",
                measured=[d / t for d, t in zip(dense, rest[top], strict=True)],
                pair=(dense, rest[top]),
            ),
            claim(
                f"{budget} budget: He is worst; its perplexity over that of the next ({worst})",
                source="ours",
                bar=1.0,
                direction="at_least",
                measured=[h / w for h, w in zip(he, rest[worst], strict=True)],
                pair=(he, rest[worst]),
            ),
            claim(
                f"{budget} budget: share of the He-to-dense gap that spectral closes",
                source="ours",
                bar=0.35,
                direction="at_least",
                measured=gap_closed(rows, "spectral", budget, seeds),
                pair=(he, values("spectral", budget)),
            ),
        ]
    for name, text in (
        ("spectral ones", "singular vectors alone (scale 1) do as well as spectral"),
        ("warm-up", "a dense warm-up of a quarter of the steps helps"),
        ("spectral + frobenius decay", "Frobenius decay 0.1 helps"),
    ):
        for budget in ("short", "long"):
            if (f"{name} ({budget})", seeds[0]) not in rows:
                continue
            pair = values(name, budget), values("spectral", budget)
            claims.append(
                claim(
                    f"{budget} budget: {text}; perplexity over spectral's",
                    source="ours, after the paper",
                    bar=1.0,
                    direction="at_most",
                    measured=[other / spectral for other, spectral in zip(*pair, strict=True)],
                    pair=pair,
                )
            )
    for rate, base in (("", "spectral (long)"), (", rate 3e-3", "look: spectral, rate 3e-3 (long)")):
        name = f"look: spectral + frobenius decay 1{rate} (long)"
        claims.append(
            claim(
                f"long budget, one seed: Frobenius decay 1 helps{rate}; perplexity over spectral's",
                source="ours, after the paper",
                bar=1.0,
                direction="at_most",
                measured=rows[name, seeds[0]]["perplexity"] / rows[base, seeds[0]]["perplexity"],
            )
        )
    return claims


def plot(rows: Sequence[Mapping[str, Any]], seeds: Sequence[int], path: Path) -> None:
    """Final perplexities at both budgets, and the long runs' loss curves."""
    from hf_efx.core.results.plots import matplotlib_pyplot, save_figure

    plt = matplotlib_pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    for axis, budget in zip(axes, ("short", "long"), strict=False):
        names = list(dict.fromkeys(r["configuration"] for r in rows if r["configuration"].endswith(f"({budget})")))
        groups = [[r["perplexity"] for r in rows if r["configuration"] == n] for n in names]
        order = sorted(range(len(names)), key=lambda i: -sum(groups[i]) / len(groups[i]))
        for y, i in enumerate(order):
            mean = sum(groups[i]) / len(groups[i])
            axis.plot(groups[i], [y] * len(groups[i]), "o", color="C0", alpha=0.5, markersize=5)
            axis.plot([mean], [y], "|", color="black", markersize=16)
        axis.set_yticks(range(len(order)), [names[i].removesuffix(f" ({budget})") for i in order])
        steps = next(r["steps"] for r in rows if r["configuration"] == names[0])
        axis.set_xlabel("validation perplexity per byte")
        axis.set_title(f"{steps:,} steps: seeds and their mean")
        axis.grid(axis="x", alpha=0.3)
    seen = dict.fromkeys(r["configuration"] for r in rows if r["configuration"].endswith("(long)"))
    for name in [n for n in seen if not n.startswith("look")]:
        curves = [r["curve"] for r in rows if r["configuration"] == name and r["seed"] in seeds]
        steps = [step for step, _ in curves[0]]
        means = [sum(c[i][1] for c in curves) / len(curves) for i in range(len(steps))]
        axes[2].plot(steps[1:], means[1:], label=name.removesuffix(" (long)"))
    axes[2].set_xlabel("optimiser steps")
    axes[2].set_ylabel("training loss (nats per byte), mean over seeds")
    axes[2].set_title(f"{curves[0][-1][0]:,} steps")
    axes[2].legend()
    axes[2].grid(alpha=0.3)
    save_figure(figure, path, dpi=110)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the study."""
    from hf_efx.core.results.evidence import StudyRows, print_results, public_command, write_results

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="file, folder or Hub name of a text (default: the standard library's own)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, nargs=2, default=[800, 3200], metavar=("SHORT", "LONG"))
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--output", type=Path, help="results file (default: results/low_rank.json here)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: 1 seed, a few steps, written to runs/")
    options = parser.parse_args(argv)
    if options.quick:
        options.seeds, options.steps = options.seeds[:1], [20, 30]
    path = options.output or (Path("runs/reproduce") if options.quick else HERE / "results") / "low_rank.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    short, long = options.steps

    with tempfile.TemporaryDirectory() as folder:
        data = prepare(options.data, Path(folder))
        settings = {
            "model": MODEL,
            "batch": f"{BATCH} blocks of {BLOCK} bytes",
            "optimiser": f"AdamW, constant rate {LEARNING_RATE}, no weight decay, no dropout",
            "rank": 0.25,
            "steps": options.steps,
            "data": data,
        }
        rows = StudyRows(path, settings)
        jobs = [_job(f"{n} (short)", c, short, s) for n, c in CONFIGURATIONS.items() for s in options.seeds]
        jobs += [_job(f"{n} (long)", CONFIGURATIONS[n], long, s) for n in LONG for s in options.seeds]
        run_all(run, jobs, rows, options.workers, data=folder)
        table = {(r["configuration"], r["seed"]): r for r in rows.rows}
        rest = [n for n in CONFIGURATIONS if n not in LONG]
        best = min(rest, key=lambda n: sum(table[f"{n} (short)", s]["perplexity"] for s in options.seeds))
        jobs = [_job(f"{best} (long)", CONFIGURATIONS[best], long, s) for s in options.seeds]
        jobs += [_job(f"look: {n} (long)", c, long, options.seeds[0]) for n, c in LOOK.items()]
        run_all(run, jobs, rows, options.workers, data=folder)

    table = {(r["configuration"], r["seed"]): r for r in rows.rows}
    closed = {n: statistics.fmean(gap_closed(table, n, "short", options.seeds)) for n in ("spectral", "warm-up")}
    plot(rows.rows, options.seeds, path.with_suffix(".png"))
    results = write_results(
        path,
        title="Low-rank training of a byte-level GPT-2",
        headline=f"at rank 0.25 and {short} steps spectral initialisation closes {closed['spectral']:.0%} of the gap "
        f"between He and dense, a dense warm-up {closed['warm-up']:.0%}",
        command=public_command(),
        data=data,
        seeds=options.seeds,
        rows=rows.rows,
        claims=make_claims(table, options.seeds, best),
        columns=[
            {"key": "steps", "title": "steps", "format": ","},
            {"key": "parameters", "title": "parameters", "format": ","},
            {"key": "perplexity", "title": "perplexity per byte", "format": ".3f"},
            {"key": "effective_rank_share", "title": "effective rank / rank", "format": ".3f"},
            {"key": "frobenius_norm", "title": "mean norm of a layer", "format": ".2f"},
        ],
        plot=path.with_suffix(".png").name,
        settings=settings,
        notes=[
            f"{name}: {asdict(c)}"
            for name, c in (*CONFIGURATIONS.items(), *LOOK.items())
            if c.arguments or c.warmup_share
        ],
    )
    print_results(results)
    rows.finish()


if __name__ == "__main__":
    main()
