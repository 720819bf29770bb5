"""scripts/quickstart.py, with few steps on a small text."""

import json

import pytest
from conftest import REPOSITORY
from huggingface_hub import ModelCard

SCRIPT = REPOSITORY / "scripts" / "quickstart.py"
RUNS = ["dense", "he", "spectral", "spectral ones", "ones, rms"]


@pytest.fixture(scope="module")
def finished(run_python, tmp_path_factory):
    """What a short run printed, and its folder."""
    folder = tmp_path_factory.mktemp("quickstart")
    words = "one two three four five six seven eight nine ten".split()
    lines = [" ".join([words[i * j % 10] for j in range(20)] + [str(i)]) for i in range(400)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    arguments = ["--dataset", folder / "text.txt", "--steps", 8, "--output_dir", folder / "out", "--vocab_size", 300]
    return run_python(SCRIPT, args=arguments), folder / "out"


def test_the_table_shows_all_runs_with_equal_low_rank_sizes(finished):
    shown, folder = finished
    rows = {row["configuration"]: row for row in json.loads((folder / "results.json").read_text())["rows"]}
    assert list(rows) == RUNS and all(f"│ {name}" in shown for name in RUNS)
    # Two layers of width 128 at rank 32, see tests/test_cli.py; 300 tokens and 128 positions; the last norm.
    dense = 428 * 128 + 256 + 2 * (49_536 + 16_512 + 66_048 + 65_664 + 512)
    low_rank = 428 * 128 + 256 + 2 * (24_960 + 32 * 256 + 128 + 20_992 + 32 * 640 + 128 + 512)
    assert [row["parameters"] for row in rows.values()] == [dense, *[low_rank] * 4]
    assert all(row["dense_parameters"] == dense for row in rows.values())
    # AdamW: two float32 moments of each parameter, and a float32 count of each tensor, 28 dense and 36 factorised.
    assert rows["dense"]["optimizer_bytes"] == 8 * dense + 4 * 28
    assert rows["spectral"]["optimizer_bytes"] == 8 * low_rank + 4 * 36
    assert rows["dense"]["gap_closed"] == 1 and rows["he"]["gap_closed"] == 0
    gap = rows["he"]["eval_perplexity"] - rows["dense"]["eval_perplexity"]
    assert rows["spectral"]["gap_closed"] == pytest.approx(
        (rows["he"]["eval_perplexity"] - rows["spectral"]["eval_perplexity"]) / gap
    )


def test_a_new_process_finds_the_same_logits_and_generates(finished):
    shown, _ = finished
    report = shown[shown.index("largest difference of a logit: ") :].splitlines()
    assert float(report[0].rpartition(" ")[2]) < 1e-5
    texts = [json.loads(line) for line in report[1:4]]
    assert [text.split()[0] for text in texts] == ["The", "Return", "If"]
    assert all(len(text) > 20 for text in texts)


def test_the_folder_is_a_whole_model_repository(finished):
    _, folder = finished
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "loss.png", "results.json"} <= names
    assert not {name for name in names if name.endswith((".bin", ".pt"))}
    card = ModelCard.load(folder / "README.md")
    best = min(
        (row for row in json.loads((folder / "results.json").read_text())["rows"] if row["configuration"] != "dense"),
        key=lambda row: row["eval_perplexity"],
    )
    results = {result.metric_type: result for result in card.data.eval_results}  # pyright: ignore
    assert results["perplexity"].metric_value == best["eval_perplexity"]
    assert results["perplexity"].dataset_name == "text.txt" and results["perplexity"].dataset_split == "validation"
    assert "low_rank" in card.data.tags and "![Training curves](loss.png)" in card.text  # pyright: ignore
    assert all(f"| {name} |" in card.text for name in RUNS)
    assert json.loads((folder / "config.json").read_text())["quantization_config"] == {"quant_method": "hf_efx"}


def test_changed_weights_fail_the_check(finished, run_python, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    _, folder = finished
    shutil.copytree(folder, tmp_path / "changed")
    weights = load_file(tmp_path / "changed" / "model.safetensors")
    weights["transformer.ln_f.bias"] += 0.1
    save_file(weights, tmp_path / "changed" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match="isn't the one that was saved"):
        run_python(SCRIPT, args=["--check", tmp_path / "changed"])


def test_all_runs_see_the_same_batches_from_the_same_dense_weights(finished, monkeypatch):
    """Inputs are equal at every step, and spectral factors multiply to the dense weights' best approximation."""
    import torch

    from hf_efx.programs.causal_lm import DataOptions, load_corpus

    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import quickstart  # pyright: ignore[reportMissingImports]

    _, folder = finished
    corpus = load_corpus(DataOptions(str(folder.parent / "text.txt"), block_size=quickstart.BLOCK, vocab_size=300))
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in RUNS}
    models = {}
    for name in RUNS:
        trainer = quickstart.trainer_of(name, corpus, 3, 0)
        trainer.args.set_evaluate(strategy="no")
        models[name] = {key: value.clone() for key, value in trainer.model.state_dict().items()}
        trainer.model.register_forward_pre_hook(
            lambda _, args, kwargs, name=name: seen[name].append(kwargs["input_ids"].clone()), with_kwargs=True
        )
        trainer.train()
    batches = seen["dense"]
    assert len(batches) == 3 and not batches[0].equal(batches[1])
    assert all(a.equal(b) for name in RUNS for a, b in zip(batches, seen[name], strict=True))
    dense, spectral = models["dense"], models["spectral"]
    assert dense["transformer.wte.weight"].equal(spectral["transformer.wte.weight"])
    weight = dense["transformer.h.0.mlp.c_fc.weight"].T  # [512, 128]
    product = spectral["transformer.h.0.mlp.c_fc.weight"][0] @ spectral["transformer.h.0.mlp.c_fc.factor_v"]
    missed = torch.linalg.svdvals(weight)[32:].square().sum().sqrt()
    torch.testing.assert_close(torch.linalg.matrix_norm(weight - product), missed, rtol=1e-4, atol=1e-6)
