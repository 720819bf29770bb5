"""Options from a YAML file and the command line."""

from dataclasses import dataclass, field

import pytest

from hf_efx import LowRankArguments, LowRankConfig
from hf_efx.programs.command_line import OptionParser


@dataclass
class Own:
    """Options of a made-up program."""

    steps: int = field(default=1, metadata={"help": "How many, at 100% of them."})
    name: str | None = field(default=None, metadata={"help": "What it is called."})
    draw: bool = field(default=True, metadata={"help": "Whether to draw."})

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps={self.steps}: expected 0 or more.")


def parser() -> OptionParser:
    return OptionParser([Own, LowRankArguments], LowRankConfig, "program", "Does nothing.")


@pytest.fixture
def read(tmp_path):
    """Reads a YAML text, if given, with arguments on top of it."""

    def read_(*arguments: str, yaml: str | None = None):
        if yaml is not None:
            (tmp_path / "run.yaml").write_text(yaml)
            arguments = ("--config", str(tmp_path / "run.yaml"), *arguments)
        return parser().read([*arguments, "--output_dir", str(tmp_path)])

    return read_


def test_the_command_line_wins_over_the_file_over_the_defaults(read):
    own, args, config = read("--steps", "3", "--rank", "8", yaml="steps: 2\nname: file\nrank: 0.5\ninit: he\n")
    assert (own.steps, own.name, own.draw) == (3, "file", True)
    assert (config.rank, config.init, config.only_if_smaller) == (8, "he", True)
    assert args.learning_rate == 5e-5


def test_file_values_mean_what_they_mean_on_the_command_line(read):
    text = """
    learning_rate: 1e-3        # a string to YAML
    save_strategy: no          # a bool to YAML
    name: null
    draw: false
    rank: 1.0                  # the whole share, not rank 1
    lr_scheduler_type: constant_with_warmup
    lr_scheduler_kwargs: {last_epoch: 3}
    target_modules: [c_attn, c_fc]
    rank_pattern: {c_fc: 4, c_attn: 0.5}
    only_if_smaller: false
    """
    own, args, config = read(yaml=text)
    assert args.learning_rate == 0.001 and args.save_strategy == "no" and args.lr_scheduler_kwargs == {"last_epoch": 3}
    assert own.name is None and own.draw is False
    assert config.rank == 1.0 and isinstance(config.rank, float)
    assert config.target_modules == ["c_attn", "c_fc"] and config.rank_pattern == {"c_fc": 4, "c_attn": 0.5}
    assert config.only_if_smaller is False


@pytest.mark.parametrize(
    "words, name, value",
    [
        (["--rank", "4"], "rank", 4),
        (["--rank", "auto", "--parameter_budget", "0.5"], "rank", "auto"),
        (["--target_modules", "c_attn"], "target_modules", ["c_attn"]),
        (["--target_modules", "all-linear"], "target_modules", "all-linear"),
        (["--target_modules", r".*\.(c_attn|c_fc)"], "target_modules", r".*\.(c_attn|c_fc)"),
        (["--target-modules", "c_attn", "c_fc"], "target_modules", ["c_attn", "c_fc"]),
        (["--target_modules", "[ab]_proj("], "target_modules", "[ab]_proj("),
        (["--layers_to_transform", "0", "2"], "layers_to_transform", [0, 2]),
        (["--factor_activation", "silu"], "factor_activation", "silu"),
        (["--factor_activation", "none"], "factor_activation", None),
        (["--init", "spectral_ones", "--spectral_ones_scale", "rms"], "spectral_ones_scale", "rms"),
    ],
)
def test_config_options(read, words, name, value):
    found = getattr(read(*words)[-1], name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "yaml, arguments, words",
    [
        ("learning_rat: 1e-3\n", [], "unknown key 'learning_rat'; did you mean learning_rate"),
        ("rnak: 4\n", [], "unknown key 'rnak'; did you mean rank"),
        ("config: other.yaml\n", [], "unknown key 'config'"),
        ("- 1\n", [], "holds no `option: value` lines"),
        ("a: [1\n", [], "is no YAML"),
        ("rank: 4\nrank: 8\n", [], "the key 'rank' stands twice"),
        ("target-modules: [a]\ntarget_modules: [b]\n", [], "says target_modules twice, as 'target-modules' and as"),
        ("steps:\n", [], "steps has no value: give one, or leave the line out"),
        ("rank: null\n", [], "rank=None"),
        ("target_modules: [[a], b]\n", [], "target_modules=[['a'], 'b'] holds more than values"),
        (None, ["--config", "."], "config='.' can't be read"),
        (None, ["--config", "a.yaml", "--config", "b.yaml"], "config='a.yaml' and config='b.yaml': give one file"),
        (None, ["--stepz", "2"], "unknown option --stepz; did you mean steps"),
        (None, ["--qqqqqqqq"], "program --help lists all"),
        (None, ["--config", "not-there.yaml"], "not-there.yaml"),
        (None, ["--steps", "-1"], "steps=-1: expected 0 or more"),
        (None, ["--steps", "many"], "invalid int value: 'many'"),
        (None, ["--rank", "0"], "rank=0: expected"),
        (None, ["--only_if_smaller", "maybe"], "only_if_smaller='maybe': expected true or false"),
        (None, ["--factor_decay", "-1"], "factor_decay=-1.0: expected"),
    ],
)
def test_wrong_input_ends_with_status_2_and_one_line(read, capsys, yaml, arguments, words):
    with pytest.raises(SystemExit) as ended:
        read(*arguments, yaml=yaml)
    shown = capsys.readouterr().err
    assert ended.value.code == 2
    assert shown.startswith("program: error: ") and words in shown
    assert "--steps STEPS" not in shown  # no list of all options


def test_help_lists_the_options_of_all_classes(capsys):
    with pytest.raises(SystemExit) as ended:
        parser().read(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    assert "at 100% of them" in shown and "--learning_rate" in shown and "--rank_pattern" in shown
    assert "--base_model_name_or_path" not in shown  # peft's housekeeping
