"""Options of RHO-LOSS: what is refused, presets, the command line."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments

from hf_efx.core.training.arguments import describe_options
from hf_efx.rho_loss.arguments import PRESETS, RHOLossArguments, RHOLossArgumentsMixin


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selection_ratio": 0.0}, "selection_ratio=0.0: expected a share above 0 up to 1"),
        ({"selection_ratio": 1.5}, "selection_ratio=1.5"),
        ({"selection_ratio": float("nan")}, "selection_ratio=nan"),
        ({"selection": "rho"}, "selection='rho': expected one of uniform, loss, .*register_selection_function"),
        ({"granularity": "word"}, "granularity='word': expected one of 'example', 'token'"),
        ({"score_mode": "test"}, "score_mode='test'"),
        ({"selection_scope": "node"}, "selection_scope='node'"),
        ({"scoring_precision": "int8"}, "scoring_precision='int8': expected one of nothing, 'training', 'bf16'"),
        ({"scoring_task": "vision"}, "scoring_task='vision'"),
        ({"rescore_every": 0}, "rescore_every=0: expected 1 or more"),
        ({"scoring_batch_size": 0}, "scoring_batch_size=0"),
        ({"mc_samples": 1}, "mc_samples=1: expected 2 or more"),
        ({"rescore_every": 4, "selection_ratio": 0.25}, "rescore_every=4 with selection_ratio=0.25"),
        ({"preset": "faster"}, "preset='faster': expected one of fast"),
        ({"granularity": "token", "selection_scope": "global"}, "selection_scope='global' needs granularity="),
        ({"granularity": "token", "rescore_every": 2}, "rescore_every=2 needs granularity='example'"),
        ({"granularity": "token", "selection": "grad_norm_is"}, "selection='grad_norm_is' samples with weights"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RHOLossArgumentsMixin(**options)


def test_defaults_are_the_papers_rule() -> None:
    options = RHOLossArgumentsMixin()
    assert (options.selection, options.selection_ratio, options.rescore_every) == ("rho_loss", 0.1, 1)
    assert (options.score_mode, options.scoring_precision, options.preset) == ("eval", None, None)


def test_a_preset_leaves_what_was_set() -> None:
    assert PRESETS["fast"].items() <= vars(RHOLossArgumentsMixin(preset="fast")).items()
    assert RHOLossArgumentsMixin(preset="fast", rescore_every=3).rescore_every == 3


def test_what_is_passed_is_left_though_it_equals_the_default(tmp_path: Path) -> None:
    passed = {"selection_ratio": 0.1, "scoring_precision": "training"}
    options = {"preset": "fast", "output_dir": str(tmp_path), "use_cpu": True}
    parser = HfArgumentParser(RHOLossArguments)  # type: ignore[arg-type]
    words = [f"--{name}={value}" for name, value in {**options, **passed}.items()]
    (tmp_path / "run.yaml").write_text("\n".join(f"{name}: {value}" for name, value in {**options, **passed}.items()))
    for arguments in (
        RHOLossArguments(**options, **passed),
        parser.parse_args_into_dataclasses(words)[0],
        parser.parse_yaml_file(tmp_path / "run.yaml")[0],
    ):
        assert {name: getattr(arguments, name) for name in passed} == passed
    for arguments in (
        RHOLossArguments(**options),
        parser.parse_args_into_dataclasses(words[:3])[0],
        parser.parse_dict(options)[0],
        dataclasses.replace(RHOLossArguments(str(tmp_path), use_cpu=True), preset="fast"),
    ):
        assert {name: getattr(arguments, name) for name in PRESETS["fast"]} == PRESETS["fast"]
    assert PRESETS["fast"].keys() == passed.keys()


def test_options_go_onto_other_arguments_and_the_command_line(tmp_path: Path) -> None:
    @dataclass
    class Options(RHOLossArgumentsMixin, Seq2SeqTrainingArguments):
        pass

    words = f"--output_dir {tmp_path} --selection loss --selection_ratio 0.25 --scoring_precision bf16 --use_cpu True"
    for cls in (Options, RHOLossArguments):
        (parsed,) = HfArgumentParser(cls).parse_args_into_dataclasses(words.split())
        assert (parsed.selection, parsed.selection_ratio, parsed.scoring_precision) == ("loss", 0.25, "bf16")
        assert parsed.scoring_batch_size is None and parsed.learning_rate == 5e-5
        with pytest.raises(ValueError, match="selection_ratio=2.0"):
            cls(str(tmp_path), selection_ratio=2.0)


def test_every_option_has_a_text() -> None:
    assert len(describe_options(RHOLossArgumentsMixin)) == 15
