"""What sampling translations costs: one call against N `generate` calls, keyed masks, pairwise BLEU, memory.

    python scripts/benchmarks/mc_dropout.py            # as published: 3 seeds, a Marian of 7.6 million parameters, CPU
    python scripts/benchmarks/mc_dropout.py --quick    # a smoke run: a small model, written to runs/

The models have new weights; the end token's bias is set so that translations end at lengths as different as real ones.
Each way of sampling draws N = 10 greedy samples of the same sources in CPU seconds of one thread, in turn, several
rounds: the ratios are those of one run. Memory is the peak of a process that scores 2,000 sources (Linux).
"""

import argparse
import contextlib
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from step_time import kept_rows, measured, process_memory
from transformers import MarianConfig, MarianMTModel

from hf_efx import dropout_active, sample_generate
from hf_efx.core.results.evidence import claim, figures, print_results, public_command, write_results
from hf_efx.core.scoring import decoding, sampling
from hf_efx.mc_dropout import pairwise_bleu

HERE = Path(__file__).parent
SAMPLES = 10
SOURCES = (1, 8, 40)
LONGEST = 64  # tokens of a translation at most
OURS, CALLS = "sample_generate", "N generate calls"
WAYS = (OURS, CALLS, "one generate call of repeated sources", "finished rows kept", "torch's masks")
BARS = {1: 4.0, 8: 3.0, 40: 2.0}
MASKS = {1: 1.5, 40: 1.2}
SCORED = 2000
LIMIT = 2 * 2**30
COLUMNS = (
    ("seconds", "CPU seconds", ".2f"),
    ("speedup", "N generate calls / this", ".2f"),
    ("tokens", "tokens a sample", ".1f"),
    ("share", "time / sample_generate's", ".2f"),
    ("pair_seconds", "seconds a source", ".5f"),
    ("pair_speedup", "sacrebleu calls / pairwise_bleu", ".1f"),
    ("peak_bytes", "peak (bytes)", ",.0f"),
    ("sources_per_second", "sources / s", ".2f"),
)
NOTES = [
    "N generate calls: a loop over `generate` with torch's own dropout on, nothing kept but the tokens; a sampler "
    "that keeps scores and hidden states, as lm-polygraph's does, takes longer than this bound.",
    "One generate call of repeated sources: the sources N times in one batch, torch's dropout, no row left out early.",
    "Finished rows kept, torch's masks: sample_generate without that one part.",
    "sacrebleu calls: a sentence BLEU for each ordered pair by one BLEU object, whose tokenizer keeps what it saw.",
]
Row = dict[str, Any]


def marian(seed: int, small: bool) -> Any:
    """A Marian with new weights whose translations end at different lengths."""
    torch.manual_seed(seed)
    size: dict[str, Any] = (
        {"d_model": 64, "vocab_size": 500, "layers": 2} if small else {"d_model": 256, "vocab_size": 8000, "layers": 3}
    )
    layers = size.pop("layers")
    config = MarianConfig(
        **size,
        **{f"{part}_layers": layers for part in ("encoder", "decoder")},
        **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
        **{f"{part}_ffn_dim": 4 * size["d_model"] for part in ("encoder", "decoder")},
        max_position_embeddings=512,
        scale_embedding=True,
        init_std=size["d_model"] ** -0.5,
        pad_token_id=size["vocab_size"] - 1,
        decoder_start_token_id=size["vocab_size"] - 1,
        eos_token_id=0,
        forced_eos_token_id=0,
    )
    model = MarianMTModel(config).eval()
    model.generation_config.suppress_tokens = [config.pad_token_id]
    return model


def set_end(model: Any, inputs: dict[str, torch.Tensor]) -> None:
    """Sets the end token's bias so that half of the rows end within about twelve tokens."""
    low, high = 0.0, 10.0
    for _ in range(6):
        middle = (low + high) / 2
        model.final_logits_bias[0, 0] = middle
        lengths = sample_generate(model, inputs, 2, max_new_tokens=LONGEST).lengths
        median = statistics.median(length for row in lengths for length in row)
        low, high = (low, middle) if median < 12 else (middle, high)


def sources(model: Any, count: int, seed: int) -> dict[str, torch.Tensor]:
    """Random tokens of 5 to 25 a source, padded."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 26, (count,), generator=generator)
    ids = torch.randint(1, model.config.pad_token_id, (count, int(lengths.max())), generator=generator)
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    ids = torch.where(mask.bool(), ids, model.config.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask}


class _TorchMasks(contextlib.AbstractContextManager):
    """Stands in for `KeyedDropout`, and leaves dropout to torch."""

    device = torch.device("cpu")

    def __init__(self, *_: Any) -> None: ...

    def __exit__(self, *_: Any) -> None: ...

    def set_rows(self, *_: Any) -> None: ...

    def keep_rows(self, *_: Any) -> None: ...


@contextlib.contextmanager
def replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    """Gives a module another part for a while."""
    kept = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, kept)


def ways(model: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Callable[[], Any]]:
    """The ways of drawing samples that are timed."""
    repeated = {name: value.repeat_interleave(SAMPLES, 0) for name, value in inputs.items()}
    common: dict[str, Any] = {"max_new_tokens": LONGEST}

    def ours() -> Any:
        return sample_generate(model, inputs, SAMPLES, **common)

    def calls() -> None:
        with dropout_active(model):
            for _ in range(SAMPLES):
                model.generate(**inputs, **common, num_beams=1, do_sample=False)

    def repetition() -> None:
        with dropout_active(model):
            model.generate(**repeated, **common, num_beams=1, do_sample=False)

    def torch_masks() -> None:
        with replaced(sampling, "KeyedDropout", _TorchMasks):
            ours()

    def kept() -> None:
        with replaced(decoding, "_FINISHED", 2.0):  # a share of finished rows that is never reached
            ours()

    return dict(zip(WAYS, (ours, calls, repetition, kept, torch_masks), strict=True))


def sampling_rows(seed: int, count: int, rounds: int, small: bool) -> list[Row]:
    """CPU seconds of every way on the same sources, the median of the rounds, in turn."""
    model = marian(seed, small)
    set_end(model, sources(model, 40, seed + 1000))
    inputs = sources(model, count, seed)
    timed: dict[str, list[float]] = {name: [] for name in WAYS}
    for turn in range(rounds + 1):
        for name, draw in ways(model, inputs).items():
            start = time.process_time()
            draw()
            if turn:  # the first warms up
                timed[name].append(time.process_time() - start)
    seconds = {name: statistics.median(values) for name, values in timed.items()}
    lengths = sample_generate(model, inputs, SAMPLES, max_new_tokens=LONGEST).lengths
    tokens = statistics.fmean(length for row in lengths for length in row)
    return [
        {
            "configuration": f"{count} sources: {name}",
            "seconds": value,
            "speedup": seconds[CALLS] / value,
            "share": value / seconds[OURS],
            "tokens": tokens,
        }
        for name, value in seconds.items()
    ]


def bleu_row(seed: int, number: int, texts: int) -> Row:
    """Pairwise BLEU of N texts a source against a sacrebleu call for each ordered pair."""
    from sacrebleu.metrics.bleu import BLEU

    generator = random.Random(seed)
    words = [f"w{i}" for i in range(200)]
    bases = [generator.choices(words, k=generator.randint(4, 24)) for _ in range(texts)]
    groups = [
        [
            " ".join(w if generator.random() > 0.2 else generator.choice(words) for w in base) + "."
            for _ in range(number)
        ]
        for base in bases
    ]
    metric = BLEU(effective_order=True)

    def calls() -> None:
        for group in groups:
            for i, text in enumerate(group):
                for j, other in enumerate(group):
                    if i != j:
                        metric.sentence_score(text, [other])

    def ours() -> None:
        for group in groups:
            pairwise_bleu(group)

    seconds = {}
    for name, work in (("sacrebleu", calls), ("ours", ours)) * 2:  # the second time with tokens seen before
        start = time.process_time()
        work()
        seconds[name] = time.process_time() - start
    share = seconds["sacrebleu"] / seconds["ours"]
    return {
        "configuration": f"pairwise BLEU, N = {number}",
        "pair_seconds": seconds["ours"] / texts,
        "pair_speedup": share,
    }


def memory_row(seed: int, small: bool) -> Row:
    """Peak of this process after it scored 2,000 sources by 10 samples."""
    import tempfile

    from hf_efx.core.data.marian_tokenizer import train_marian_tokenizer
    from hf_efx.mc_dropout import score_translations

    model = marian(seed, small)
    generator = random.Random(seed)
    words = ["".join(generator.choices("abcdefghij", k=generator.randint(2, 6))) for _ in range(3000)]
    count = 40 if small else SCORED
    texts = [" ".join(generator.choices(words, k=generator.randint(3, 12))) for _ in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = train_marian_tokenizer(Path(folder, "tokenizer"), texts, 200 if small else 1500)
        inputs = tokenizer(texts[:20], return_tensors="pt", padding=True)
        set_end(model, {name: inputs[name] for name in ("input_ids", "attention_mask")})
        # What the model says beyond the tokenizer's words has no text.
        model.generation_config.suppress_tokens = list(range(len(tokenizer) - 1, model.config.vocab_size))
        start = time.process_time()
        score_translations(
            model, tokenizer, texts, output_dir=Path(folder, "out"), max_new_tokens=LONGEST, progress=False
        )
        seconds = time.process_time() - start
    return {"peak_bytes": process_memory("VmHWM"), "seconds": seconds, "sources_per_second": count / seconds}


def measure(name: str, seed: int, rounds: int, small: bool) -> list[Row]:
    """The rows of one configuration; memory in a process of its own."""
    if name == "memory":
        words = [sys.executable, __file__, "--memory", str(seed), *(["--quick"] if small else [])]
        output = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        count = 40 if small else SCORED
        return [{"configuration": f"{count:,} sources scored", **json.loads(output.splitlines()[-1])}]
    if name.startswith("pairwise"):
        return [bleu_row(seed, int(name.split()[-1]), 5 if small else 50)]
    return sampling_rows(seed, int(name.split()[0]), rounds, small)


def make_claims(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The bars."""
    common: dict[str, Any] = {"source": "ours", "direction": "at_least"}
    claims = [
        claim(
            f"N = {SAMPLES} generate calls over sample_generate, {count} source{'s' if count > 1 else ''}, CPU time",
            bar=bar,
            measured=figures(rows, f"{count} sources: {OURS}", "speedup"),
            **common,
        )
        for count, bar in BARS.items()
    ]
    for count, bar in MASKS.items():
        shares = [1 / share for share in figures(rows, f"{count} sources: torch's masks", "share")]
        text = f"keyed masks over torch's own dropout, {count} source{'s' if count > 1 else ''}"
        claims.append(claim(text, source="ours", bar=bar, direction="at_most", measured=shares))
    pairs = figures(rows, "pairwise BLEU, N = 10", "pair_speedup")
    claims.append(claim("a sacrebleu call for each pair over pairwise_bleu, N = 10", bar=5, measured=pairs, **common))
    peaks = [row["peak_bytes"] / 2**30 for row in rows if "peak_bytes" in row]
    text = f"peak of a process that scores {SCORED:,} sources by {SAMPLES} samples, GiB"
    claims.append(claim(text, source="ours", bar=2.0, direction="at_most", measured=peaks))
    return claims


def headline(claims: Sequence[dict[str, Any]]) -> str:
    """Speed and memory in one sentence."""
    speed = [f"{one['measured']:.1f}" for one in claims[: len(SOURCES)]]
    return (
        f"{SAMPLES} samples of {', '.join(map(str, SOURCES))} sources {', '.join(speed)} times as fast as {SAMPLES} "
        f"generate calls; pairwise BLEU {claims[-2]['measured']:.0f} times as fast as sacrebleu calls"
    )


def plot(rows: Sequence[Row], path: Path) -> None:
    """Seconds of each way, and pairwise BLEU."""
    from hf_efx.core.results.plots import matplotlib_pyplot, save_figure

    plt = matplotlib_pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 4.5), layout="constrained")
    for i, name in enumerate(WAYS):
        means = [statistics.fmean(figures(rows, f"{count} sources: {name}", "share")) for count in SOURCES]
        axes[0].bar([x + 0.16 * i for x in range(len(SOURCES))], means, 0.16, label=name)
    axes[0].set_xticks([x + 0.32 for x in range(len(SOURCES))], [f"{count} sources" for count in SOURCES])
    axes[0].set(ylabel="CPU seconds / sample_generate's", title=f"{SAMPLES} samples a source")
    axes[0].legend(fontsize="small")
    names = sorted({row["configuration"] for row in rows if "pair_speedup" in row}, key=lambda n: int(n.split()[-1]))
    axes[1].bar(names, [statistics.fmean(figures(rows, name, "pair_speedup")) for name in names])
    axes[1].set(ylabel="sacrebleu calls / pairwise_bleu", title="pairwise BLEU")
    for axis in axes:
        axis.grid(alpha=0.3, axis="y")
    save_figure(figure, path, dpi=90)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--quick", action="store_true", help="a smoke run: a small model, written to runs/")
    parser.add_argument("--memory", type=int, metavar="SEED", help="measure the memory alone and print it")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.memory is not None:
        print(json.dumps(memory_row(options.memory, options.quick)))
        return
    if options.quick:
        options.seeds, options.rounds = options.seeds[:1], 1
    path = options.output or (Path("runs/benchmarks") if options.quick else HERE / "results") / "mc_dropout.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    work = [(f"{count} sources", seed) for seed in options.seeds for count in SOURCES]
    work += [(f"pairwise BLEU, N = {number}", seed) for seed in options.seeds for number in (5, 10, 30)]
    work += [("memory", options.seeds[0])]
    kept = kept_rows(path, options)
    rows = measured(kept, work, lambda name, seed: measure(name, seed, options.rounds, options.quick))
    claims = make_claims(rows)
    plot(rows, path.with_suffix(".png"))
    results = write_results(
        path,
        title="Sampling translations with dropout",
        headline=headline(claims),
        command=public_command(),
        data={"name": "random tokens", "fingerprint": "of the seed"},
        seeds=options.seeds,
        rows=rows,
        claims=claims,
        columns=[{"key": key, "title": title, "format": spec} for key, title, spec in COLUMNS],
        plot=path.with_suffix(".png").name,
        settings={"samples": SAMPLES, "translations": f"{LONGEST} tokens at most", "rounds": options.rounds},
        notes=NOTES,
    )
    print_results(results)
    kept.finish()


if __name__ == "__main__":
    main()
