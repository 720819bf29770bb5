"""The parts of an architecture that the methods need to know: a dataclass for each model type.

Only names stand here, never a copy of a model's forward. A new model type is a new row in `BLOCK_MAPS`.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

KINDS = ("mlp", "attention", "conv")


@dataclass(frozen=True)
class Block:
    """Hidden units inside one branch of a network: the modules that emit them, and those that read them.

    Between emitters and readers stands only what treats each unit alone: activations, products of two emitters' units,
    attention within a head, the batch norms named in `norms`. A LayerNorm over the units is not such. Names are
    relative to some module of the model; the block is there once for each module that has all of them, so that one row
    names the blocks of all layers:

        Block("mlp", emits=("fc1",), reads=("fc2",))

    Attributes:
        kind: "mlp" (units are features), "attention" (units are heads) or "conv" (units are channels).
        emits: Modules whose output holds the units, in attention those of query, key and value.
        reads: Modules whose input holds the units.
        norms: Batch norms between them, with a scale, a shift and running statistics for each unit.
        biases: Embeddings with a column for each head, in the layers that have one (T5's position bias).
        head_dim: Attention: where the width of one head stands, such as "self_attn.head_dim", or the width itself.
        fused: Emitters whose output stacks several projections of equal size, with their number.
        follows: Attributes that the code around reads and that must say what is there, with what they count: "width"
            (the features of one projection) or "heads".
        shared: Whether the same block of all layers keeps or drops the same units, since the layers add one bias.
        dropouts: Attributes that hold the probability of a dropout on this branch, such as "dropout.p".

    Raises:
        ValueError: If the kind is unknown, no module is named, or the heads' width is missing.
    """

    kind: str
    emits: Sequence[str]
    reads: Sequence[str]
    norms: Sequence[str] = ()
    biases: Sequence[str] = ()
    head_dim: str | int | None = None
    fused: Mapping[str, int] = field(default_factory=dict)
    follows: Mapping[str, str] = field(default_factory=dict)
    shared: bool = False
    dropouts: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Block: kind={self.kind!r}: expected one of {', '.join(KINDS)}.")
        for name in ("emits", "reads", "norms", "biases", "dropouts"):
            value = getattr(self, name)
            if isinstance(value, str) or not all(isinstance(v, str) for v in value):
                raise ValueError(f"Block: {name}={value!r}: expected a list of names, such as ['fc1'].")
            object.__setattr__(self, name, tuple(value))  # JSON has lists
        if not self.emits or not self.reads:
            raise ValueError(f"Block: emits={self.emits!r}, reads={self.reads!r}: name at least one module in each.")
        if (self.kind == "attention") != (self.head_dim is not None):
            raise ValueError(
                f"Block: kind={self.kind!r} with head_dim={self.head_dim!r}: a block of kind 'attention' says how "
                f"wide a head is (a number, or the attribute that holds it), no other block does."
            )
        unknown = {what for what in self.follows.values()} - {"width", "heads"}
        if unknown:
            raise ValueError(f"Block: follows has {sorted(unknown)[0]!r}: an attribute counts 'width' or 'heads'.")


@dataclass(frozen=True)
class FoundBlock:
    """A `Block` at one place of a model: the same names, from the model's root.

    Attributes:
        block: The row.
        root: Name of the module that the row's names are relative to.
    """

    block: Block
    root: str

    def path(self, name: str) -> str:
        """A name of the row from the model's root."""
        return f"{self.root}.{name}" if self.root else name

    @property
    def name(self) -> str:
        """What the block is called: the name of its first emitter."""
        return self.path(self.block.emits[0])

    @property
    def members(self) -> list[str]:
        """Names of the modules that hold weights of the units, but for `biases`: emitters, norms, readers."""
        return [self.path(name) for name in (*self.block.emits, *self.block.norms, *self.block.reads)]


@dataclass(frozen=True)
class BlockMap:
    """Names of an architecture's parts, as suffixes of module names.

    Attributes:
        fused: Modules whose output stacks several projections of equal size, with their number: each is a matrix of
            its own, and a shared decomposition would serve the one that dominates.
        blocks: The blocks of hidden units, the more particular row first.
        rotary: Whether rotary embeddings tie pairs of a head's features to each other.
        layerdrop: Fields of the model's config that skip whole layers at random.
    """

    fused: Mapping[str, int] = field(default_factory=dict)
    blocks: tuple[Block, ...] = ()
    rotary: bool = False
    layerdrop: tuple[str, ...] = ()

    def blocks_of(self, name: str) -> int:
        """Number of stacked projections in the module of that name, 1 for an ordinary one."""
        for suffix, blocks in self.fused.items():
            if name == suffix or name.endswith(f".{suffix}"):
                return blocks
        return 1


def find_blocks(model: nn.Module, rows: Iterable[Block]) -> list[FoundBlock]:
    """Every place in a model that a row describes, in the model's order.

    A module emits into one block and reads from one: where two rows claim it, the first has it.
    """
    names = {name for name, _ in model.named_modules()}
    found, emitters, readers = [], set(), set()
    for root, _ in model.named_modules():
        for row in rows:
            block = FoundBlock(row, root)
            emits, reads = (set(map(block.path, part)) for part in (row.emits, row.reads))
            if names.issuperset(block.members) and not emits & emitters and not reads & readers:
                found.append(block)
                emitters |= emits
                readers |= reads
    return found


_GPT2_ATTENTION = {
    "reads": ("c_proj",),
    "head_dim": "head_dim",
    "follows": {"split_size": "width"},
    "dropouts": ("attn_dropout.p", "resid_dropout.p"),
}


def _projections(attention: str, out: str, *dropouts: str) -> Block:
    """Attention with separate projections that are called q_proj, k_proj and v_proj."""
    emits = tuple(f"{attention}{name}_proj" for name in "qkv")
    return Block("attention", emits, (f"{attention}{out}",), head_dim=f"{attention}head_dim", dropouts=dropouts)


def _t5_attention(attention: str) -> Block:
    return Block(
        "attention",
        emits=(f"{attention}.q", f"{attention}.k", f"{attention}.v"),
        reads=(f"{attention}.o",),
        biases=(f"{attention}.relative_attention_bias",),
        head_dim=f"{attention}.key_value_proj_dim",
        follows={f"{attention}.n_heads": "heads"},
        shared=True,
        dropouts=(f"{attention}.dropout", "dropout.p"),
    )


_LLAMA = BlockMap(
    blocks=(
        _projections("", "o_proj", "attention_dropout"),
        Block("mlp", emits=("gate_proj", "up_proj"), reads=("down_proj",)),
    ),
    rotary=True,
)

BLOCK_MAPS: dict[str, BlockMap] = {
    # GPT-2 stacks query, key, value in c_attn; in cross-attention key and value alone.
    "gpt2": BlockMap(
        fused={"crossattention.c_attn": 2, "attn.c_attn": 3},
        blocks=(
            Block("attention", emits=("q_attn", "c_attn"), **_GPT2_ATTENTION),
            Block("attention", emits=("c_attn",), **_GPT2_ATTENTION),
            Block("mlp", emits=("c_fc",), reads=("c_proj",), dropouts=("dropout.p",)),
        ),
    ),
    "bert": BlockMap(
        blocks=(
            Block(
                "attention",
                emits=("self.query", "self.key", "self.value"),
                reads=("output.dense",),
                head_dim="self.attention_head_size",
                dropouts=("self.dropout.p", "output.dropout.p"),
            ),
            Block("mlp", emits=("intermediate.dense",), reads=("output.dense",), dropouts=("output.dropout.p",)),
        ),
    ),
    "vit": BlockMap(
        blocks=(
            _projections("attention.", "o_proj", "attention.attention_dropout", "dropout.p"),
            Block("mlp", emits=("mlp.fc1",), reads=("mlp.fc2",), dropouts=("dropout.p",)),
        ),
    ),
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "t5": BlockMap(
        blocks=(
            _t5_attention("SelfAttention"),
            _t5_attention("EncDecAttention"),
            *(
                Block(
                    "mlp",
                    emits=tuple(f"DenseReluDense.{name}" for name in emits),
                    reads=("DenseReluDense.wo",),
                    dropouts=("DenseReluDense.dropout.p", "dropout.p"),
                )
                for emits in (("wi",), ("wi_0", "wi_1"))
            ),
        ),
    ),
    "marian": BlockMap(
        blocks=(
            _projections("self_attn.", "out_proj", "self_attn.dropout", "dropout"),
            _projections("encoder_attn.", "out_proj", "encoder_attn.dropout", "dropout"),
            Block("mlp", emits=("fc1",), reads=("fc2",), dropouts=("activation_dropout", "dropout")),
        ),
        layerdrop=("encoder_layerdrop", "decoder_layerdrop"),
    ),
    # The residual width stays: the channels between the convolutions of one layer are the units.
    "resnet": BlockMap(
        blocks=tuple(
            Block(
                "conv",
                emits=(f"layer.{i}.convolution",),
                reads=(f"layer.{i + 1}.convolution",),
                norms=(f"layer.{i}.normalization",),
            )
            for i in (0, 1)
        ),
    ),
}


def block_map(model: nn.Module) -> BlockMap:
    """The block map of a model, by its config's `model_type`; an empty one for unknown types and plain modules."""
    return BLOCK_MAPS.get(getattr(getattr(model, "config", None), "model_type", ""), BlockMap())


def block_entry(entry: Any) -> Block:
    """A Block, as it is or from the dict that `block_fields` gives.

    Raises:
        ValueError: For anything else.
    """
    if isinstance(entry, Block):
        return entry
    known = {f.name for f in dataclasses.fields(Block)}
    if not isinstance(entry, dict) or not set(entry) <= known:
        raise ValueError(
            f"blocks has the entry {entry!r}: expected a Block, such as Block('mlp', emits=['fc1'], reads=['fc2'])."
        )
    return Block(**entry)


def block_fields(block: Block) -> dict[str, Any]:
    """The fields that differ from their defaults, as JSON values."""
    values = {f.name: getattr(block, f.name) for f in dataclasses.fields(Block)}
    values = {name: value for name, value in values.items() if value not in ((), {}, None, False)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
