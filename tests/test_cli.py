"""The command `hf-efx`: what stands on the screen, exit codes, and how light it is."""

import json

import pytest

from hf_efx import cli
from hf_efx.registry import METHODS

TINY = "n_layer=2,n_embd=128,n_head=4,n_positions=128,vocab_size=257,bos_token_id=256,eos_token_id=256"


def numbers(row: str) -> list[str]:
    """The cells of a printed line that are numbers."""
    return [cell for cell in row.split() if cell.replace(",", "").replace(".", "").isdigit()]


def test_list_shows_every_method_with_its_status(capsys):
    assert cli.main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines if line.split() and line.split()[0] in ("low-rank", "npt")}
    assert "2209.13569" in rows["low-rank"] and rows["low-rank"].split()[-1] == "available"
    assert rows["npt"].split()[-1] == "planned"
    assert all(any(line.strip().startswith(m.command) for line in lines) for m in METHODS.values())


def test_list_imports_nothing_heavy(run_python):
    code = """
        import json, sys
        from hf_efx.cli import main
        assert main(["list"]) == 0
        print(json.dumps([name for name in ("torch", "transformers", "peft", "numpy") if name in sys.modules]))
    """
    assert json.loads(run_python(code).splitlines()[-1]) == []


def test_a_planned_method_ends_with_status_2_and_says_what_there_is(capsys):
    assert cli.main(["interlocking", "--rank", "1"]) == 2
    message = capsys.readouterr().err
    assert "interlocking (Interlocking backpropagation) is planned" in message and "Available now: low-rank" in message


@pytest.mark.parametrize(
    "argv, words",
    [
        (["low-rnk"], "did you mean low-rank"),
        (["xyzzy"], "there are list, plan, env"),
        (["list", "--all"], "list takes no options, but got '--all'"),
        (["plan", "--method", "npt"], "'npt' has no config"),
    ],
)
def test_wrong_commands_name_the_word_and_the_way_out(argv, words, capsys):
    assert cli.main(argv) == 2
    assert words in capsys.readouterr().err


def test_help_version_and_no_command(capsys):
    assert cli.main([]) == 0 and cli.main(["--version"]) == 0
    shown = capsys.readouterr().out
    assert "hf-efx plan" in shown and "hf_efx 0." in shown


def test_methods_are_found_under_both_spellings(monkeypatch):
    calls = []
    monkeypatch.setattr(cli, "_load", lambda path: lambda argv: calls.append((path, argv)) or 7)
    assert cli.main(["low-rank", "--seed", "1"]) == cli.main(["low_rank", "--seed", "1"]) == 7
    assert calls == 2 * [("hf_efx.low_rank.program.main", ["--seed", "1"])]


def test_env_tells_versions_and_devices(capsys):
    import torch

    assert cli.main(["env"]) == 0
    shown = {line.strip().partition("  ")[0]: line for line in capsys.readouterr().out.splitlines()}
    assert torch.__version__ in shown["torch"] and "(" in shown["CPU"]
    assert {"hf_efx", "python", "transformers", "peft", "accelerate", "extras", "CPU", "GPUs"} <= set(shown)


def test_plan_shows_parameters_before_and_after(capsys):
    assert cli.main(["plan", "--model_type", "gpt2", "--config_overrides", TINY, "--rank", "0.25"]) == 0
    shown = capsys.readouterr().out
    # Two layers. Rank 0.25 of 128 is 32. c_attn: three blocks [128, 128], 3 * 32 * 256 weights + 384 biases.
    attention = next(line for line in shown.splitlines() if "attn.c_attn" in line)
    assert numbers(attention)[-3:] == [f"{2 * (128 * 384 + 384):,}", f"{2 * (3 * 32 * 256 + 384):,}", "0.50"]
    # c_fc: [512, 128], 32 * (512 + 128) weights + 512 biases.
    wide = next(line for line in shown.splitlines() if "mlp.c_fc" in line)
    assert numbers(wide)[-3:] == [f"{2 * (512 * 128 + 512):,}", f"{2 * (32 * 640 + 512):,}", "0.32"]
    assert "lm_head" in shown and "stays dense" in shown
    # Embeddings 385 * 128, and of each layer beside the above: c_proj and its factors, mlp.c_proj, two norms.
    dense = 385 * 128 + 256 + 2 * (49_536 + 16_512 + 66_048 + 65_664 + 512)
    low_rank = 385 * 128 + 256 + 2 * (24_960 + 32 * 256 + 128 + 20_992 + 32 * 640 + 128 + 512)
    assert f"{dense:,} parameters before, {low_rank:,} after ({low_rank / dense:.2f})" in shown


def test_plan_says_which_layers_stay_dense(capsys):
    # Rank 0.62 * 128 = 79 is above a square layer's break-even rank 64, and below 512 * 128 / 640 = 102.4.
    assert cli.main(["plan", "--config_overrides", TINY, "--rank", "0.62"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all("stays dense" in line for line in lines if ".attn." in line)
    assert all("rank 79" in line for line in lines if ".mlp." in line)


def test_plan_reads_a_checkpoint_of_any_kind_without_its_weights(tmp_path, capsys):
    from transformers import BertConfig

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertConfig(**small, architectures=["BertForSequenceClassification"]).save_pretrained(tmp_path)  # pyright: ignore
    assert cli.main(["plan", "--model", str(tmp_path), "--target_modules", "query", "--rank", "2"]) == 0
    shown = capsys.readouterr().out
    query = next(line for line in shown.splitlines() if "query" in line)
    assert numbers(query)[-3:] == ["272", "80", "0.29"]  # 16 * 16 + 16, and 2 * (16 + 16) + 16
    assert "BertForSequenceClassification" in shown and "classifier" in shown


def test_plan_of_a_method_that_acts_in_training_alone(capsys):
    argv = ["plan", "--method", "slice-out", "--config_overrides", TINY, "--rate", "{mlp: 0.5, attention: 0.25}"]
    assert cli.main(argv) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.split()}
    assert lines["transformer.h.*.attn.c_attn"].split()[1:] == ["2", *"emits 3 of 4 heads".split()]
    assert lines["transformer.h.*.mlp.c_proj"].split()[1:] == ["2", *"reads 256 of 512 features".split()]
    assert cli.main([*argv[:3], "--model_type", "resnet", "--rate", "0.5", "--layers_to_transform", "0"]) == 0
    shown = capsys.readouterr().out
    assert "emits 32 of 64 channels, reads 32 of 64 channels" in shown and "ResNetModel: " in shown
    assert "stays dense" in lines["lm_head"] and "acts in training steps alone" in lines["GPT2LMHeadModel:"]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--rank", "auto", "--parameter_budget", "0.5"], "Pass --weights"),
        (["--rank", "1.5"], "rank=1.5"),
        (["--rnak", "0.5"], "unknown option --rnak; did you mean rank"),
        (["--model", "./not-there"], "'./not-there': there is no such folder"),
        (["--weights", "true"], "needs a checkpoint"),
        (["--target_modules", "nothing_here"], "matches no module"),
    ],
)
def test_plan_refuses_with_a_reason(argv, words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", "--config_overrides", TINY, *argv])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
