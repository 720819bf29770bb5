"""The program `hf-efx low-rank`: from options to checkpoint, figures, card and plot."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel

from hf_efx import LowRankConfig, SliceOutConfig, TargetedDropoutConfig, get_efx_model
from hf_efx.core.data.text_data import load_text
from hf_efx.core.model.record import efx_record
from hf_efx.low_rank.decay import factorised_layers
from hf_efx.low_rank.program import main, prepared
from hf_efx.programs.causal_lm import DataOptions, load_corpus, loss_sums, token_metrics
from hf_efx.programs.model_options import ModelOptions
from hf_efx.programs.task_data import causal_task

SMALL = "n_layer=1,n_embd=16,n_head=2,n_positions=32,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A file of paragraphs of several lengths, 'ä' among them: two bytes of UTF-8."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(f"{'ä' * (i % 3)} the number {i} " + "is a number " * (i % 5) for i in range(200)))
    return path


@pytest.fixture
def train(text, tmp_path):
    """Runs the program on a small model: its folder and the figures it wrote."""

    def train_(*arguments: object, out: str = "out", scratch: bool = True) -> tuple[Path, dict[str, Any]]:
        argv = ["--dataset", text, "--output_dir", tmp_path / out, "--block_size", 32, "--use_cpu", *arguments]
        argv += ["--config_overrides", SMALL] if scratch else []
        argv += ["--report_to", "none", *([] if "--max_steps" in arguments else ["--max_steps", 4])]
        assert main([str(word) for word in argv]) == 0
        results = json.loads((tmp_path / out / "results.json").read_text())
        return tmp_path / out, results["rows"][0]

    return train_


def nats(folder: Path, examples: list[list[int]]) -> tuple[float, int]:
    """Sum of a saved model's losses in nats over all tokens that it predicts, example by example, and their number."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in examples:
            log_probs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
            total -= sum(log_probs[i, token].item() for i, token in enumerate(ids[1:]))
            count += len(ids) - 1
    return total, count


def documents(text: Path) -> list[bytes]:
    return [str(document).encode() for document in load_text(text)["validation"]["text"]]


def test_perplexity_and_bits_per_byte_are_those_of_the_saved_model(train, text):
    folder, row = train("--learning_rate", "1e-2")
    held_out = documents(text)
    stream = [token for document in held_out for token in [*document, 256]]  # a byte's token is its value
    blocks = [stream[i : i + 32] for i in range(0, len(stream) - 31, 32)]
    total, count = nats(folder, blocks)
    assert row["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    # A token is a byte, but for the end-of-text tokens, which cost bits and are no bytes.
    bytes_per_token = sum(map(len, held_out)) / len(stream)
    assert row["eval_bits_per_byte"] == pytest.approx(total / count / math.log(2) / bytes_per_token, rel=1e-5)


def test_line_mode_counts_each_token_once_whatever_the_padding(train, text):
    folder, row = train("--mode", "line", "--per_device_eval_batch_size", 3)
    total, count = nats(folder, [[*document, 256][:32] for document in documents(text)])
    assert row["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_checkpoint_card_results_and_plot_agree(train):
    folder, row = train("--rank", "0.5", "--init", "he", "--eval_strategy", "steps", "--eval_steps", 2)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    modules = efx_record(model)["methods"][0]["modules"]  # pyright: ignore[reportOptionalSubscript]
    assert modules["transformer.h.0.mlp.c_fc"]["rank"] == 8  # half of 16
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    card = ModelCard.load(folder / "README.md")
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}  # pyright: ignore
    assert values == {"perplexity": row["eval_perplexity"], "bits_per_byte": row["eval_bits_per_byte"]}
    assert "| low_rank.rank | `0.5` |" in card.text and "| low_rank.init | `he` |" in card.text
    assert f"# {folder.name}\n" in card.text and "arXiv:2209.13569" in card.text and "import hf_efx" in card.text
    assert (folder / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert AutoTokenizer.from_pretrained(folder)("ä").input_ids == [0xC3, 0xA4]


def test_the_dense_twin_is_a_plain_model_and_a_start_for_factors(train, tmp_path):
    folder, row = train("--method", "dense", "--no_plot", "--learning_rate", "1e-2", out="dense")
    assert type(AutoModelForCausalLM.from_pretrained(folder)) is GPT2LMHeadModel
    assert "efx" not in json.loads((folder / "config.json").read_text())
    assert row["parameters"] == row["dense_parameters"] and not (folder / "loss.png").exists()
    assert "nothing but transformers is needed" in (folder / "README.md").read_text()
    # AdamW: two float32 moments of each parameter and a float32 count of each of 16 tensors (2 embeddings, 12 of the
    # layer, 2 of the last norm; the head is tied).
    assert row["optimizer_bytes"] == 8 * row["parameters"] + 4 * 16
    assert row["step_seconds"] > 0
    # A checkpoint is factorised by its SVD, at full rank exactly.
    whole = ("--rank", "1.0", "--only_if_smaller", "false", "--learning_rate", "0", "--max_steps", 1, "--no_plot")
    _, after = train("--model", folder, *whole, out="whole", scratch=False)
    assert after["eval_perplexity"] == pytest.approx(row["eval_perplexity"], rel=1e-5)
    assert after["parameters"] > row["parameters"]
    still = ("--learning_rate", "0", "--max_steps", 1, "--no_plot")
    again, same = train("--model", tmp_path / "whole", *still, out="again", scratch=False)
    assert same["eval_perplexity"] == pytest.approx(after["eval_perplexity"], rel=1e-6)
    assert efx_record(AutoModelForCausalLM.from_pretrained(again)) is not None


def test_warm_up_trains_dense_first(train):
    folder, row = train("--dense_warmup_steps", 1, "--save_strategy", "no", "--max_steps", 2, "--no_plot")
    assert efx_record(AutoModelForCausalLM.from_pretrained(folder)) and row["parameters"] < row["dense_parameters"]


def test_a_tokenizer_is_trained_and_saved(train, text):
    folder, row = train("--vocab_size", 300, "--max_steps", 2, "--no_plot")
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    held_out = documents(text)
    tokens = sum(len(tokenizer(document.decode()).input_ids) + 1 for document in held_out)
    assert len(tokenizer) == 300 and tokens < sum(map(len, held_out))
    nats_per_token = math.log(row["eval_perplexity"])
    bits = nats_per_token / math.log(2) * tokens / sum(map(len, held_out))
    assert row["eval_bits_per_byte"] == pytest.approx(bits)


def test_another_architecture(train, text, tmp_path):
    llama = "hidden_size=16,intermediate_size=32,num_hidden_layers=1,num_attention_heads=2,num_key_value_heads=1"
    folder, row = train(
        *("--model_type", "llama", "--config_overrides", llama, "--max_steps", 1, "--no_plot"), scratch=False
    )
    assert AutoModelForCausalLM.from_pretrained(folder).config.head_dim == 8  # pyright: ignore
    assert row["parameters"] < row["dense_parameters"]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--block_size", "64"], "block_size=64 is above the model's 32 positions"),
        (["--config_overrides", "n_layers=1"], "'n_layers' is no setting of GPT2Config"),
        (["--config_overrides", "n_layer"], "'n_layer' has no value"),
        (["--tokenizer", "./not-there"], "Name another (--tokenizer)"),
        (["--tokenizer", "x", "--vocab_size", "300"], "exclude each other"),
        (["--rank", "17"], "rank=17 is above min(in, out)=16"),
        (["--resume_from_checkpoint", "true"], "No valid checkpoint found"),
        (["--method", "dense", "--dense_warmup_steps", "2"], "needs low_rank_config"),
        (["--max_eval_blocks", "0"], "max_eval_blocks=0"),
    ],
)
def test_wrong_input_ends_with_status_2_before_training(text, tmp_path, capsys, arguments, words):
    argv = ["--dataset", str(text), "--output_dir", str(tmp_path / "out"), "--block_size", "32", "--max_steps", "2"]
    with pytest.raises(SystemExit) as ended:
        main([*argv, "--use_cpu", "--config_overrides", SMALL, *arguments])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.safetensors"))


@pytest.fixture(scope="module")
def task(text):
    return causal_task(load_corpus(DataOptions(str(text), block_size=32, max_eval_blocks=3)))


def dense(task, seed: int = 0) -> Any:
    return task.model_init(seed, ModelOptions(config_overrides=SMALL))


def saved(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "config", [TargetedDropoutConfig(), SliceOutConfig(rate=0.5, align=1)], ids=lambda c: c.method
)
def test_a_checkpoint_of_a_training_method_is_factorised_not_trained_dense(task, tmp_path, config):
    model = prepared(saved(get_efx_model(dense(task), config), tmp_path), LowRankConfig(rank=4))
    assert len(factorised_layers(model)) == 4
    assert [entry["method"] for entry in efx_record(model)["methods"]] == ["low_rank"]  # pyright: ignore
    plain = prepared(saved(get_efx_model(dense(task), config), tmp_path), None)
    assert efx_record(plain) is None and not factorised_layers(plain)


def test_a_factorised_checkpoint_takes_no_ranks(task, tmp_path):
    model = saved(get_efx_model(dense(task), LowRankConfig(rank=4)), tmp_path)
    with pytest.raises(ValueError, match="factorised already, so rank can't be chosen"):
        prepared(model, LowRankConfig(rank=0.5))
    with pytest.raises(ValueError, match="merge_and_unload"):
        prepared(model, None)
    assert prepared(model, LowRankConfig()) is model


def test_he_factors_are_not_the_numbers_of_the_dense_weights(task):
    whole, he = dense(task), prepared(dense(task), LowRankConfig(rank=0.25, init="he"))
    assert whole.transformer.wte.weight.equal(he.transformer.wte.weight)  # pyright: ignore
    factor = he.transformer.h[0].attn.c_attn.factor_v.flatten()  # pyright: ignore
    for name, weight in whole.named_parameters():
        n = min(factor.numel(), weight.numel())
        if weight.dim() == 2:
            assert abs(torch.corrcoef(torch.stack([factor[:n], weight.flatten()[:n]]))[0, 1]) < 0.5, name


def test_loss_sums_by_hand():
    # Two tokens of a vocabulary of 4, uniform: log 4 for each predicted token; the padded row predicts one.
    logits = torch.zeros(2, 3, 4)
    labels = torch.tensor([[0, 1, 2], [3, 1, -100]])
    sums = loss_sums((logits,), labels)
    torch.testing.assert_close(sums, torch.tensor([[2 * math.log(4), 2.0], [math.log(4), 1.0]]))
    from transformers import EvalPrediction

    found = token_metrics(0.5)(EvalPrediction(sums.numpy(), labels.numpy()))
    assert found["perplexity"] == pytest.approx(4) and found["bits_per_byte"] == pytest.approx(4)
    huge = token_metrics(1.0)(EvalPrediction(torch.tensor([[1e6, 1.0]]).numpy(), labels.numpy()))
    assert huge["perplexity"] == math.inf
