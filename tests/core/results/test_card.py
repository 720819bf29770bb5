"""Model cards read back with their metadata; cards of results against a worked example."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import EvalResult, ModelCard

from hf_efx.core.results.card import markdown_table, render_result_card, write_model_card
from hf_efx.core.results.evidence import claim, read_results, write_results

METHOD = SimpleNamespace(
    name="low_rank",
    title="Low-rank training",
    paper="Exploring | Low Rank",
    arxiv="2209.13569",
    status="available",
    citation="@article{kamalakara2022,\n  year = {2022}\n}",
)


def result(value, metric="perplexity", **changes):
    usual = {
        "task_type": "text-generation",
        "dataset_type": "library_text",
        "dataset_name": "Python's library text",
        "dataset_split": "validation",
        "metric_type": metric,
        "metric_value": value,
    }
    return EvalResult(**{**usual, **changes})


def test_metadata_comes_back(tmp_path):
    (tmp_path / "loss.png").write_bytes(b"")
    path = write_model_card(
        tmp_path,
        model_name="tiny-low-rank",
        methods=["low_rank"],
        results=[result(np.float32(11.5)), result(torch.tensor(3), "loss"), result(math.inf, "bits_per_byte")],
        description="A GPT-2 in factorised form.",
        license="apache-2.0",
        language="en",
        pipeline_tag="text-generation",
        tags=["hf_efx", "gpt2"],
        plot="loss.png",
    )
    card = ModelCard.load(path)
    data = card.data.to_dict()
    assert data["model-index"] == [
        {
            "name": "tiny-low-rank",
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"name": "Python's library text", "type": "library_text", "split": "validation"},
                    "metrics": [
                        {"type": "perplexity", "value": 11.5},
                        {"type": "loss", "value": 3},
                        {"type": "bits_per_byte", "value": "inf"},
                    ],
                }
            ],
        }
    ]
    assert data["tags"] == ["hf_efx", "low_rank", "gpt2"]
    assert (data["library_name"], data["license"], data["language"]) == ("transformers", "apache-2.0", "en")
    assert data["metrics"] == ["perplexity", "loss", "bits_per_byte"]
    assert ModelCard(str(card)).data.to_dict() == data
    assert "base_model" not in data and "![Training curves](loss.png)" in card.text


def test_card_text(tmp_path):
    text = write_model_card(
        tmp_path,
        model_name="tiny",
        repo_id="me/tiny",
        methods=["low_rank"],
        results=[result(11.4567, metric_name="Perplexity")],
        configuration={"low_rank": {"rank": 0.25, "rank_pattern": {}}},
        training={"learning_rate": 1e-3},
        comparison=(("model", "perplexity"), [("dense", "8.08")]),
        citations=[METHOD.citation],
    ).read_text()
    assert (
        "```python\nimport hf_efx  # lets transformers read these weights\n"
        "from transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("me/tiny")\n```\n' in text
    )
    assert (
        "| metric | data | value |\n| --- | --- | --- |\n| Perplexity | Python's library text (validation) | 11.46 |"
        in text
    )
    assert "| low_rank.rank | `0.25` |\n| low_rank.rank_pattern | `{}` |" in text
    assert "| learning_rate | `0.001` |" in text and "| dense | 8.08 |" in text
    assert f"```bibtex\n{METHOD.citation}\n```\n" in text
    assert f"| torch | `{torch.__version__}` |" in text
    assert "nothing but transformers" not in text and "\n\n\n" not in text


def test_plain_weights_need_no_import(tmp_path):
    text = write_model_card(tmp_path, model_name="merged", needs_hf_efx=False).read_text()
    assert "import hf_efx" not in text
    assert "The weights are plain: nothing but transformers is needed to load them." in text
    assert "model-index" not in text and "## Results" not in text and "\n\n\n" not in text


def test_names_that_the_hub_would_refuse_become_identifiers(tmp_path):
    metrics = {"ndcg@10": 0.5, "f1 macro": 0.2, "@": np.ones(2), "bleu-4/all": torch.tensor(2.0), "a/b/c": None}
    results = [result(value, name) for name, value in metrics.items()]
    path = write_model_card(tmp_path, model_name="x", results=[*results, result(1.0, dataset_type="my text")])
    (entry, other) = ModelCard.load(path).data.to_dict()["model-index"][0]["results"]
    assert entry["metrics"] == [
        {"type": "ndcg_10", "value": 0.5, "name": "ndcg@10"},
        {"type": "f1_macro", "value": 0.2, "name": "f1 macro"},
        {"type": "metric", "value": "[1.0, 1.0]", "name": "@"},
        {"type": "bleu-4/all", "value": 2.0},
        {"type": "a_b_c", "value": "None", "name": "a/b/c"},
    ]
    assert other["dataset"]["type"] == "my_text" and other["dataset"]["name"] == "Python's library text"


def test_a_plot_that_is_not_there_is_refused(tmp_path):
    for plot in ("missing.png", str(tmp_path / "loss.png")):
        with pytest.raises(ValueError, match="name a file inside"):
            write_model_card(tmp_path, model_name="x", plot=plot)
    assert not list(tmp_path.iterdir())


def test_markdown_table_keeps_its_cells():
    assert markdown_table(("a", "b"), [("x|y", "1\n2")]) == "| a | b |\n| --- | --- |\n| x\\|y | 1<br>2 |"


def test_result_card(tmp_path):
    write_results(
        tmp_path / "low_rank.json",
        title="Initialisations",
        headline="Spectral closes 43% of the gap.",
        command="python scripts/reproduce/low_rank.py --seeds 0 1",
        data={"name": "library text", "fingerprint": "ab12", "characters": 2600000},
        seeds=[0, 1],
        rows=[
            {"configuration": "dense", "seed": 0, "perplexity": 8.0},
            {"configuration": "dense", "seed": 1, "perplexity": 10.0},
        ],
        claims=[
            claim("he worst", source="ours", bar=0, measured=1.0, direction="at_least"),
            claim("decay helps", source="section 4", bar=0, measured=-1.0, direction="at_least"),
        ],
        columns=[{"key": "perplexity", "title": "perplexity", "format": ".1f"}],
        plot="low_rank.png",
        settings={"steps": 800},
        notes=["Warm-up didn't help."],
    )
    text = render_result_card(
        read_results(tmp_path / "low_rank.json"), method=METHOD, source="scripts/reproduce/results/low_rank.json"
    )
    assert text.startswith("<!-- Generated by scripts/render_results.py from scripts/reproduce/results/low_rank.json")
    for part in (
        "# Initialisations\n\nSpectral closes 43% of the gap.\n",
        "[Low-rank training](../hf_efx/low_rank/), after *Exploring | Low Rank*",
        "| configuration | perplexity |\n| --- | --- |\n| dense | 9.0 \u00b1 12.7 |",
        "Mean and half of the 95% t interval over 2 seeds",
        "![Initialisations](../scripts/reproduce/results/low_rank.png)",
        "1 of 2 hold",
        "| decay helps | section 4 | \u2265 0 | -1 | \u2013 | **no** |",
        "## Notes\n\n- Warm-up didn't help.\n",
        "```bash\npython scripts/reproduce/low_rank.py --seeds 0 1\n```",
        "| seeds | `0, 1` |\n| data | `library text` |\n| data fingerprint | `ab12` |",
        "| data characters | `2600000` |",
        "| steps | `800` |",
        "year = {2022}",
    ):
        assert part in text, part
    assert "\n\n\n" not in text and text.endswith("```\n")
