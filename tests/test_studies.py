"""The studies and benchmarks: their arithmetic on hand-worked numbers, and (slow) a smoke run of each program."""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path += [str(SCRIPTS / "benchmarks"), str(SCRIPTS / "reproduce")]  # as where a script runs


def load(path: str):
    spec = importlib.util.spec_from_file_location(Path(path).stem, SCRIPTS / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_gap_closed():
    study = load("reproduce/low_rank.py")
    rows = {
        (f"{name} (short)", seed): {"perplexity": value}
        for name, values in {"he": (14, 20), "dense": (10, 10), "spectral": (12, 17.5)}.items()
        for seed, value in enumerate(values)
    }
    assert study.gap_closed(rows, "spectral", "short", [0, 1]) == [0.5, 0.25]  # 2 of 4, 2.5 of 10


def test_time_floor():
    timing = load("benchmarks/step_time.py")
    # 3/4 of the reference's time is products; half of their FLOPs leave 1/4 + 3/8.
    assert timing.time_floor(0.75, 0.5) == 0.625


def test_training_flops_count_attention_and_come_back_to_the_fast_form():
    timing = load("benchmarks/step_time.py")
    width, length, vocabulary = 8, 4, 16
    config = GPT2Config(
        n_layer=1, n_embd=width, n_head=2, vocab_size=vocabulary, n_positions=length, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).train()
    model.loss_type = "ForCausalLM"
    ids = torch.zeros(1, length, dtype=torch.long)
    flops = timing.training_flops(model, lambda: model(input_ids=ids, labels=ids).loss.backward())
    weights = 12 * width**2 + width * vocabulary
    attention = 2 * length**2 * width  # scores and weighted values
    # A forward is 2 FLOPs a weight and token; a backward twice that.
    assert flops == 3 * 2 * (weights * length + attention)
    assert model.config._attn_implementation == "sdpa"


def test_side_by_side_calls_each_in_every_round():
    timing = load("benchmarks/step_time.py")
    calls = []
    times = timing.side_by_side({name: lambda name=name: calls.append(name) for name in "abc"}, 2, "cpu")
    assert calls == ["a", "b", "c", "a", "b", "c", "b", "c", "a"]  # a warm-up, then each round starts one later
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2, "c": 2}


def test_a_benchmark_keeps_what_is_timed_and_says_what_it_is_at(tmp_path, capsys):
    timing = load("benchmarks/step_time.py")
    options = argparse.Namespace(rounds=2, seeds=[0, 1], output=None)
    calls, work = [], [("a; b", 0), ("a; c", 0), ("a; b", 1)]

    def measure(name, seed):
        if len(calls) == 2:
            calls.append("ended")
            raise KeyboardInterrupt
        calls.append((name, seed))
        return [{"configuration": one, "seconds": len(calls)} for one in name.split("; ")]

    path = tmp_path / "some.json"
    with pytest.raises(KeyboardInterrupt):
        timing.measured(timing.kept_rows(path, options), work, measure)
    assert capsys.readouterr().out.splitlines()[::2] == [
        "[1/3] a; b, seed 0 ...",
        "[2/3] a; c, seed 0 ...",
        "[3/3] a; b, seed 1 ...",
    ]
    kept = timing.kept_rows(path, argparse.Namespace(rounds=2, seeds=[0], output=None))  # seeds may come to it
    rows = timing.measured(kept, work, measure)
    assert calls == [*work[:2], "ended", work[2]]
    found = [(row["configuration"], row["seed"], row["seconds"]) for row in rows]
    assert found == [("a", 0, 1), ("b", 0, 1), ("c", 0, 2), ("a", 1, 4), ("b", 1, 4)]  # of "a" a seed's first
    assert "[1/3] a; b, seed 0: timed before" in capsys.readouterr().out
    with pytest.raises(ValueError, match="rounds: 2, now 3"):
        timing.kept_rows(path, argparse.Namespace(rounds=3, seeds=[0], output=None))
    kept.finish()
    assert not list(tmp_path.iterdir())


def test_reached_and_shares_of_uniform():
    runs = load("reproduce/selection_runs.py")
    curve = [(25, 1.0, 0.5), (50, 2.0, 0.7), (75, 3.0, 0.6)]
    assert runs.reached(curve, 0.6) == (50, 2.0)
    assert runs.reached(curve, 0.71) == (None, None)
    assert runs.reached([(25, 1.0, 3.0), (50, 2.0, 2.5)], 2.6, higher=False) == (50, 2.0)
    uniform = {"part": "mlp", "seed": 0, "configuration": "mlp: uniform", "best": 0.7, "curve": curve}
    uniform |= {"flops_per_step": 100, "table_seconds": 0.0}
    fast = {"part": "mlp", "seed": 0, "configuration": "mlp: rho_loss", "best": 0.75, "curve": [(25, 1.5, 0.75)]}
    fast |= {"flops_per_step": 400, "table_seconds": 0.25}
    never = {**fast, "configuration": "mlp: loss", "best": 0.4, "curve": [(25, 1.5, 0.4)]}
    base, row, failed = runs.against_uniform([uniform, fast, never])
    assert (base["steps_share"], base["time_share"], base["gain"]) == (1.0, 1.0, 0.0)
    # 25 of 50 steps at 4 times the FLOPs; 1.5 of 2 seconds, 1.75 with the table.
    assert (row["steps_share"], row["flops_share"], row["time_share"], row["paid_share"]) == (0.5, 2.0, 0.75, 0.875)
    assert row["gain"] == pytest.approx(0.05)
    assert failed["steps_to"] is None and "steps_share" not in failed


def test_noisy_images_halve_the_training_set_and_say_where_labels_are_wrong():
    images = load("reproduce/noisy_images.py").noisy_images(None, seed=0)
    again = load("reproduce/noisy_images.py").noisy_images(None, seed=0)
    train, holdout = images.train, images.holdout
    assert set(train["example_id"]).isdisjoint(set(holdout["example_id"]))
    assert abs(len(train) - len(holdout)) <= 1
    # A tenth redrawn among ten classes: 9% wrong, within four standard errors of 700 examples.
    assert 0.045 < sum(train["corrupted"]) / len(train) < 0.135
    assert list(train["labels"]) == list(again.train["labels"])
    model = images.model("mlp-64", 0)
    rows = train.with_format("torch")[:4]
    output = model(rows["pixel_values"], rows["labels"])
    assert output["logits"].shape == (4, 10) and output["loss"].ndim == 0


def test_slice_out_is_read_at_the_time_at_which_the_faster_run_ended():
    study = load("reproduce/slice_out.py")
    dropout = [(10, 2.0, 0.3), (20, 4.0, 0.6), (30, 6.0, 0.9), (40, 8.0, 0.9)]
    fast = [(10, 1.5, 0.3), (20, 3.0, 0.9), (30, 4.5, 0.6), (40, 5.0, 0.9)]
    # Means of the last three: dropout .3 .45 .6 .8; at 5 s half way between .45 and .6.
    assert study.at_equal_time(fast, dropout) == pytest.approx((0.8, 0.525))
    rows = [
        {"part": "cnn", "seed": 0, "configuration": f"cnn: {name}", "steps": 40, "curve": curve}
        for name, curve in (("dropout", dropout), ("SliceOut, flow", fast))
    ]
    base, row = study.against_dropout(rows)
    assert (base["time_share"], base["figure"], base["milliseconds"]) == (1.0, pytest.approx(0.8), 200.0)
    assert (row["time_share"], row["dropout_at_time"]) == (0.625, pytest.approx(0.525))


def test_claims_of_targeted_dropout_pair_what_was_pruned_alike():
    study = load("reproduce/targeted_dropout.py")
    curves = {"none": (0.9, 0.6), "ramped .99/.9": (0.7, 0.89), "targeted .66/.9": (0.88, 0.84)}
    rows = [
        {"configuration": f"mlp: {kind}: {name}", "seed": seed}
        | {f"{k}_{f:g}": (low if f else full) + seed / 1000 for k in ("weight", "unit") for f in study.FRACTIONS}
        for kind, group in (("weight", study.WEIGHTS), ("unit", study.UNITS))
        for name in group
        for full, low in [curves.get(name, (0.88, 0.7))]
        for seed in (0, 1)
    ]
    claims = {c["claim"].removesuffix(" (not separated)"): c for c in study.make_claims(rows, ["mlp"])}
    below = claims["mlp, 90% of weights pruned, ramped .99/.9: accuracy below that of the unpruned dense network"]
    assert below["measured"] == pytest.approx(0.01) and below["holds"]
    above = claims["mlp, 90% of weights pruned, targeted .66/.9: accuracy above that with L1 1e-4, pruned alike"]
    assert above["measured"] == pytest.approx(0.14) and above["holds"]
    # Units of the dense network are read from its one row, which stands under weights.
    assert "mlp, 75% of units pruned, targeted .66/.75: accuracy above that with none, pruned alike" in claims


def test_prunability_in_the_sweep_and_the_control_by_seed():
    study = load("reproduce/prunability.py")
    losses = {0: (3.0, 2.0, 1.0), 1: (1.0, 2.0, 3.0)}
    sweep = [
        {"seed": seed, "hidden": width, "test_loss": loss, "prunability": 0.1 * width}
        for seed, values in losses.items()
        for width, loss in enumerate(values)
    ]
    assert study.sweep_taus(sweep, "prunability") == pytest.approx([-1, 1])
    figures = {("true", 1): 0.2, ("permuted", 0): 0.5, ("permuted", 1): 0.3, ("true", 0): 0.1}
    control = [{"labels": labels, "seed": seed, "prunability": v} for (labels, seed), v in figures.items()]
    assert study.control_differences(control, "prunability") == pytest.approx([0.4, 0.1])


def test_torch_prune_scans_to_the_hand_worked_fraction():
    benchmark = load("benchmarks/prunability.py")
    model = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[3.0, 1.0]]))

    def losses(model):  # 0 whole, 0.5 without the small weight, 5 without both
        return (model(torch.eye(2)) - torch.tensor([[3.0], [1.0]])).square()

    assert [benchmark.peer_scan(model, losses, bound) for bound in (0.4, 0.5, 5.0)] == [1.0, 0.5, 0.01]
    assert model.weight.tolist() == [[3.0, 1.0]]


def test_the_gpu_benchmark_needs_no_datasets_and_writes_what_is_timed(tmp_path, run_python):
    code = """
        import sys
        sys.modules["datasets"] = None  # to import it would fail
        sys.path.insert(0, sys.argv[1])
        import on_gpu
        on_gpu.main([f"{sys.argv[2]}/whole", "--quick", "--no-compile"])
        on_gpu.VARIANTS.clear()
        on_gpu.MAIN = {"low_rank": on_gpu.MAIN["low_rank"]}
        on_gpu.main([f"{sys.argv[2]}/compiled", "--quick"])
        on_gpu.main([f"{sys.argv[2]}/late", "--quick", "--minutes", "0"])
        """
    shown = run_python(code, args=[SCRIPTS / "benchmarks", tmp_path])
    whole = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "whole").iterdir()}
    assert set(whole) == {"low_rank", "slice_out", "targeted_dropout", "rho_loss"}
    for results in whole.values():
        names = [row["configuration"] for row in results["rows"]]
        assert len(names) == len(set(names)) and {name.partition(":")[0] for name in names} == {"GPT-2", "Llama"}
        assert all(row["milliseconds"] > 0 and row["rounds"] == 2 for row in results["rows"])
        assert results["notes"] == [] and "torch" in results["versions"]
    rows = {row["configuration"]: row for row in whole["low_rank"]["rows"]}
    assert rows["GPT-2: low rank 0.25"]["time_floor"] < rows["GPT-2: dense"]["time_floor"] == 1
    compiled = json.loads((tmp_path / "compiled" / "low_rank.json").read_text())["rows"]
    assert [row["configuration"].partition("compiled, ")[2] for row in compiled] == 2 * ["dense", "low rank 0.25"]
    assert "Llama: compiled, Low rank: left out, no time was left." in shown
    assert not list((tmp_path / "late").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "program",
    [
        *("reproduce/low_rank.py", "benchmarks/low_rank.py"),
        *("reproduce/rho_loss.py", "reproduce/goldiprox.py", "benchmarks/rho_loss.py"),
        *("reproduce/slice_out.py", "benchmarks/slice_out.py"),
        *("reproduce/targeted_dropout.py", "benchmarks/targeted_dropout.py"),
        *("reproduce/prunability.py", "benchmarks/prunability.py"),
        *("reproduce/mc_dropout.py", "benchmarks/mc_dropout.py"),
    ],
)
def test_smoke_run(program, tmp_path):
    env = os.environ | {"PYTHONPATH": str(SCRIPTS.parent)}
    subprocess.run([sys.executable, SCRIPTS / program, "--quick"], cwd=tmp_path, env=env, check=True)
    results = json.loads(next(tmp_path.glob(f"runs/*/{Path(program).stem}.json")).read_text())
    assert results["rows"] and results["claims"]
    assert (next(tmp_path.glob("runs/*")) / results["plot"]).stat().st_size > 10_000
