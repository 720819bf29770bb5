"""Our options go onto every kind of training arguments, and read alike from Python, the command line and the docs."""

from dataclasses import MISSING, dataclass, field

import pytest
from transformers import HfArgumentParser, Seq2SeqTrainingArguments, TrainingArguments

from hf_efx.core.training.arguments import EfxArguments, EfxArgumentsMixin, describe_options, parse_number


@dataclass
class RankMixin(EfxArgumentsMixin):
    """A method's options, with one that is a number or a word."""

    rank: str = field(default="0.25", metadata={"help": "Rank."})

    def __post_init__(self) -> None:
        super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue]
        self.parsed_rank = parse_number(self.rank, "rank", words=("auto",))


@dataclass
class RankArguments(RankMixin, EfxArguments):
    pass


@dataclass
class RankSeq2SeqArguments(RankMixin, Seq2SeqTrainingArguments):
    pass


@pytest.mark.parametrize("cls", [RankArguments, RankSeq2SeqArguments])
def test_mixins_keep_the_training_arguments_and_their_checks(cls, tmp_path):
    args = cls(output_dir=str(tmp_path), use_cpu=True, rank="auto", learning_rate=0.5)
    assert (args.model_card, args.parsed_rank, args.learning_rate) == (True, "auto", 0.5)
    assert args.device.type == "cpu"
    assert args.to_dict()["rank"] == "auto"
    with pytest.raises(ValueError, match="rank='high'"):
        cls(output_dir=str(tmp_path), rank="high")
    with pytest.raises(ValueError, match="requires the save and eval strategy to match"):  # transformers' own check
        cls(output_dir=str(tmp_path), load_best_model_at_end=True)


def test_command_line(tmp_path):
    parser = HfArgumentParser(RankArguments)
    line = ["--output_dir", str(tmp_path), "--use_cpu", "--rank", "0.5", "--no_model_card"]
    args = parser.parse_args_into_dataclasses(line, look_for_args_file=False)[0]
    assert (args.parsed_rank, args.model_card) == (0.5, False)
    assert "last figures" in parser.format_help().replace("\n", " ")


# trl's own default is spelled gradient_checkpointing, the name that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_onto_trls_sft_config(tmp_path):
    from trl import SFTConfig

    @dataclass
    class RankSFTConfig(RankMixin, SFTConfig):
        pass

    args = RankSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, rank="8", packing=True)
    assert (args.parsed_rank, args.model_card, args.packing) == (8, True, True)


def test_describe_options():
    assert [o.name for o in describe_options(EfxArgumentsMixin)] == ["model_card"]
    assert describe_options(RankMixin)[1] == ("rank", "0.25", "Rank.")

    @dataclass
    class Needed:
        data: str = field(metadata={"help": "Data."})
        names: list = field(default_factory=lambda: ["a"], metadata={"help": "Names."})
        derived: int = field(default=0, init=False)

    assert describe_options(Needed) == [("data", MISSING, "Data."), ("names", ["a"], "Names.")]

    @dataclass
    class Silent:
        rank: int = 4

    with pytest.raises(ValueError, match="Silent.rank has no help text"):
        describe_options(Silent)


def test_all_options_of_the_arguments_are_described():
    described = {o.name for o in describe_options(EfxArguments)}
    assert {"model_card", "learning_rate"} <= described
    assert described - {o.name for o in describe_options(TrainingArguments)} == {"model_card"}


@pytest.mark.parametrize(
    "value, expected",
    [("4", 4), ("0.25", 0.25), ("1e-3", 0.001), ("4.0", 4.0), ("-2", -2), ("auto", "auto"), (7, 7), (0.5, 0.5)],
)
def test_parse_number(value, expected):
    number = parse_number(value, "rank", words=("auto",))
    assert number == expected and type(number) is type(expected)


@pytest.mark.parametrize("value", ["high", "", "nan", "inf", "1/4", True, float("nan"), None, [4]])
def test_parse_number_refuses(value):
    with pytest.raises(ValueError, match=r"rank=.* is not a number or 'auto'"):
        parse_number(value, "rank", words=("auto",))
