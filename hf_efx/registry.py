"""The methods of this package, one row each, for tables, command line, cards and citations."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One measured claim of a method's published results, in the few words that the README's table has for it.

    Attributes:
        kind: `"study"` or `"benchmark"`.
        claim: The claim's text in those results, without "(not separated)".
        words: A format of the measured figure, such as `"{:.2f} of a dense step's time"`.
        scale: What the figure is multiplied by first: 100 for percentage points.
    """

    kind: str
    claim: str
    words: str
    scale: float = 1.0


@dataclass(frozen=True)
class Method:
    """One research method.

    Attributes:
        name: Folder and identifier, as in `hf_efx/<name>/`.
        title: The method in plain words.
        paper: Title of the paper.
        authors: Authors as the paper lists them, BibTeX form.
        year: Year of the paper.
        arxiv: arXiv identifier.
        task: What it is for.
        config: Import path of the method's PEFT-style config, None where it has none.
        options: Import paths of the dataclasses whose fields are the method's options.
        program: Import path of the function behind `hf-efx <name>`, None while the method is planned.
        quality: What its results say of quality, in the README's table.
        cost: The same of its cost.
    """

    name: str
    title: str
    paper: str
    authors: str
    year: int
    arxiv: str
    task: str
    config: str | None = None
    options: tuple[str, ...] = ()
    program: str | None = None
    quality: Figure | None = None
    cost: Figure | None = None

    @property
    def status(self) -> str:
        """`"available"` or `"planned"`."""
        return "available" if self.program else "planned"

    @property
    def command(self) -> str:
        """The method's name on the command line."""
        return self.name.replace("_", "-")

    @property
    def citation(self) -> str:
        """BibTeX entry of the paper."""
        key = f"{self.authors.split(',')[0].split()[-1].lower()}{self.year}{self.name.replace('_', '')}"
        return (
            f"@article{{{key},\n  title = {{{self.paper}}},\n  author = {{{self.authors}}},\n"
            f"  journal = {{arXiv preprint arXiv:{self.arxiv}}},\n  year = {{{self.year}}}\n}}"
        )


_ROWS = (
    Method(
        name="low_rank",
        title="Low-rank (factorised) training",
        paper="Exploring Low Rank Training of Deep Neural Networks",
        authors="Kamalakara, Siddhartha Rao and Locatelli, Acyr and Venkitesh, Bharat and Ba, Jimmy and Gal, Yarin "
        "and Gomez, Aidan N.",
        year=2022,
        arxiv="2209.13569",
        task="train fewer parameters from scratch",
        config="hf_efx.low_rank.config.LowRankConfig",
        options=("hf_efx.low_rank.config.LowRankConfig", "hf_efx.low_rank.arguments.LowRankArgumentsMixin"),
        program="hf_efx.low_rank.program.main",
        quality=Figure(
            "study",
            "short budget: share of the He-to-dense gap that spectral closes",
            "spectral start closes {:.0%} of the gap from He to dense",
        ),
        cost=Figure(
            "benchmark", "rank 0.25: time of a training step over dense", "{:.2f} of a dense step's time at rank 0.25"
        ),
    ),
    Method(
        name="rho_loss",
        title="RHO-LOSS data selection",
        paper="Prioritized Training on Points that are Learnable, Worth Learning, and Not Yet Learnt",
        authors='Mindermann, S\\"oren and others',
        year=2022,
        arxiv="2206.07137",
        task="choose the examples to train on",
        options=(
            "hf_efx.rho_loss.arguments.RHOLossArgumentsMixin",
            "hf_efx.rho_loss.program.IrreducibleOptions",
        ),
        program="hf_efx.rho_loss.program.main",
        quality=Figure(
            "study", "mlp: best accuracy above uniform's", "{:+.1f} points of accuracy over uniform draws (MLP)", 100
        ),
        cost=Figure(
            "benchmark",
            "mlp, fast preset: seconds to uniform's best over uniform's, the table paid by one run",
            "{:.2f} of uniform's seconds to its best, table included (MLP)",
        ),
    ),
    Method(
        name="goldiprox",
        title="GoldiProx shareable training sequences",
        paper="Prioritized training on points that are learnable, worth learning, and not yet learnt",
        authors='Mindermann, S\\"oren and others',
        year=2021,
        arxiv="2107.02565",
        task="choose a training sequence with a small proxy",
        options=("hf_efx.rho_loss.arguments.RHOLossArgumentsMixin", "hf_efx.goldiprox.program.SelectOptions"),
        program="hf_efx.goldiprox.program.main",
        quality=Figure(
            "study",
            "mlp-512's sequence brings mlp-2048 to uniform's best; steps over uniform's",
            "{:.2f} of uniform's steps to its best (four times wider MLP)",
        ),
        cost=Figure(
            "study",
            "mlp-512's sequence brings mlp-2048 to uniform's best; time over uniform's",
            "{:.2f} of uniform's time to its best",
        ),
    ),
    Method(
        name="npt",
        title="Non-Parametric Transformers",
        paper="Self-Attention Between Datapoints: Going Beyond Individual Input-Output Pairs in Deep Learning",
        authors="Kossen, Jannik and Band, Neil and Lyle, Clare and Gomez, Aidan N. and Rainforth, Tom and Gal, Yarin",
        year=2021,
        arxiv="2106.02584",
        task="tabular prediction that reads other rows",
    ),
    Method(
        name="prunability",
        title="Prunability",
        paper="Robustness to Pruning Predicts Generalization in Deep Neural Networks",
        authors="Kuhn, Lorenz and Lyle, Clare and Gomez, Aidan N. and Rothfuss, Jonas and Gal, Yarin",
        year=2021,
        arxiv="2103.06002",
        task="predict generalization without a validation set",
        options=("hf_efx.prunability.program.PrunabilityOptions",),
        program="hf_efx.prunability.program.main",
        quality=Figure(
            "study",
            "Kendall's tau of prunability with the accuracy gap, 92 networks",
            "Kendall's tau {:.2f} with the accuracy gap of 92 networks",
        ),
        cost=Figure(
            "benchmark",
            "seconds over those of a scan with torch.nn.utils.prune",
            "{:.2f} of the seconds of a scan by torch.nn.utils.prune",
        ),
    ),
    Method(
        name="interlocking",
        title="Interlocking backpropagation",
        paper="Interlocking Backpropagation: Improving depthwise model-parallelism",
        authors="Gomez, Aidan N. and Key, Oscar and Perlin, Kuba and Gou, Stephen and Frosst, Nick and Dean, Jeff and "
        "Gal, Yarin",
        year=2022,
        arxiv="2010.04116",
        task="train pipeline stages with local losses",
    ),
    Method(
        name="slice_out",
        title="SliceOut",
        paper="SliceOut: Training Transformers and CNNs faster while using less memory",
        authors="Notin, Pascal and Gomez, Aidan N. and Yoo, Joanna and Gal, Yarin",
        year=2020,
        arxiv="2007.10909",
        task="dropout that makes the matrices smaller",
        config="hf_efx.slice_out.config.SliceOutConfig",
        options=("hf_efx.slice_out.config.SliceOutConfig",),
        program="hf_efx.slice_out.program.main",
        quality=Figure(
            "study",
            "cnn: SliceOut, circular, accuracy above that of dropout at equal epochs",
            "{:+.1f} points of accuracy against dropout, equal epochs (CNN)",
            100,
        ),
        cost=Figure(
            "study",
            "cnn: SliceOut, circular, CPU time of as many epochs over dropout's",
            "{:.2f} of dropout's time (CNN)",
        ),
    ),
    Method(
        name="mc_dropout",
        title="MC-dropout translation uncertainty (BLEUVar)",
        paper="Wat zei je? Detecting Out-of-Distribution Translations with Variational Transformers",
        authors="Xiao, Tim Z. and Gomez, Aidan N. and Gal, Yarin",
        year=2020,
        arxiv="2006.08344",
        task="know when a translation is unsure",
        options=("hf_efx.mc_dropout.program.ScoringOptions", "hf_efx.mc_dropout.options.TranslationOptions"),
        program="hf_efx.mc_dropout.program.main",
        quality=Figure(
            "study",
            "AUROC of BLEUVar (N = 10) for Dutch sources of the same English",
            "AUROC {:.3f} for Dutch shown to a German-English model (number words)",
        ),
        cost=Figure(
            "benchmark",
            "N = 10 generate calls over sample_generate, 40 sources, CPU time",
            "{:.1f} times as fast as ten generate calls (40 sources)",
        ),
    ),
    Method(
        name="bdl_benchmark",
        title="Bayesian deep learning benchmark on diabetic retinopathy",
        paper="A Systematic Comparison of Bayesian Deep Learning Robustness in Diabetic Retinopathy Tasks",
        authors="Filos, Angelos and others",
        year=2019,
        arxiv="1912.10481",
        task="compare estimators by their uncertainty",
    ),
    Method(
        name="targeted_dropout",
        title="Targeted dropout",
        paper="Learning Sparse Networks Using Targeted Dropout",
        authors="Gomez, Aidan N. and Zhang, Ivan and Kamalakara, Siddhartha Rao and Madaan, Divyam and "
        "Swersky, Kevin and Gal, Yarin and Hinton, Geoffrey E.",
        year=2019,
        arxiv="1905.13678",
        task="train networks that stand pruning",
        config="hf_efx.targeted_dropout.config.TargetedDropoutConfig",
        options=("hf_efx.targeted_dropout.config.TargetedDropoutConfig",),
        program="hf_efx.targeted_dropout.program.main",
        quality=Figure(
            "study",
            "mlp, 90% of weights pruned, ramped .99/.9: accuracy below that of the unpruned dense network",
            "{:+.1f} points of accuracy with 90% of weights pruned (MLP)",
            -100,
        ),
        cost=Figure(
            "benchmark",
            "a training step with candidates renewed every 50 steps over dense",
            "{:.2f} of a dense step's time",
        ),
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _ROWS}
