"""What an import costs and touches, and who may import whom."""

import ast
import graphlib
import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hf_efx
import hf_efx.mc_dropout
from hf_efx.registry import METHODS

PACKAGE = Path(hf_efx.__file__).parent
METHOD_FOLDERS = sorted(name for name in METHODS if (PACKAGE / name).is_dir())

# A method that builds on another's score, one way each; see CONTRIBUTING.md.
ALLOWED = {("goldiprox", "rho_loss"), ("bdl_benchmark", "mc_dropout")}


def imported(file: Path) -> set[str]:
    """Every module of ours that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "hf_efx"}


def module_of(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}
# Which modules of ours each module imports; a package that hands names on counts as itself.
IMPORTS = {
    module: {name if name in FILES else name.rpartition(".")[0] for name in imported(file)}
    for module, file in FILES.items()
}


def rooms(modules: set[str]) -> set[str]:
    """The folders below the package, such as `core`, `programs` or a method's."""
    return {name.split(".")[1] for name in modules if name.count(".") > 1 or name.removeprefix("hf_efx.") in ROOMS}


ROOMS = {folder.name for folder in PACKAGE.iterdir() if (folder / "__init__.py").is_file()}


def test_core_imports_neither_methods_nor_programs() -> None:
    inside = {module: rooms(names) for module, names in IMPORTS.items() if module.startswith("hf_efx.core")}
    assert len(inside) > 30
    assert {module: found - {"core"} for module, found in inside.items()} == dict.fromkeys(inside, set())


def test_programs_import_core_and_no_method() -> None:
    inside = {module: rooms(names) for module, names in IMPORTS.items() if module.startswith("hf_efx.programs.")}
    assert len(inside) > 4
    assert {module: found - {"core", "programs"} for module, found in inside.items()} == dict.fromkeys(inside, set())


@pytest.mark.parametrize("method", METHOD_FOLDERS)
def test_methods_do_not_import_each_other_and_only_their_program_imports_programs(method: str) -> None:
    inside = {module: names for module, names in IMPORTS.items() if module.startswith(f"hf_efx.{method}")}
    assert inside
    for module, names in inside.items():
        others = rooms(names) & METHODS.keys() - {method}
        assert {(method, other) for other in others} <= ALLOWED, module
        assert "programs" not in rooms(names) or module == f"hf_efx.{method}.program", module


def test_imports_make_no_circle() -> None:
    graph = graphlib.TopologicalSorter(IMPORTS)  # those inside functions and under TYPE_CHECKING count too
    graph.prepare()  # raises CycleError, which names the circle


def test_low_rank_is_among_the_methods_checked() -> None:
    assert "low_rank" in METHOD_FOLDERS


def test_what_loading_imports_keeps_peft_out() -> None:
    # transformers imports loading.py while it is itself being imported, and peft imports transformers.
    for name in ("loading", "record"):
        tree = ast.parse((PACKAGE / "core" / "model" / f"{name}.py").read_text())
        top = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        names = {alias.name for node in top for alias in node.names} | {getattr(node, "module", "") for node in top}
        assert not any(str(name).startswith(("peft", "hf_efx.core.model.adapter")) for name in names)


@pytest.fixture(scope="module")
def import_costs(run_python: Callable[..., str]) -> list[tuple[float, set[str]]]:
    """Seconds and new modules of `import hf_efx`, in three processes."""
    program = """
        import sys, time
        before, start = set(sys.modules), time.perf_counter()
        import hf_efx
        print(time.perf_counter() - start, *sorted({name.split(".")[0] for name in set(sys.modules) - before}))
    """
    lines = [run_python(program).split() for _ in range(3)]
    return [(float(seconds), set(names)) for seconds, *names in lines]


def test_import_is_fast(import_costs: list[tuple[float, set[str]]]) -> None:
    assert min(seconds for seconds, _ in import_costs) < 0.5


def test_import_loads_neither_torch_nor_peft_nor_transformers(import_costs: list[tuple[float, set[str]]]) -> None:
    for _, names in import_costs:
        assert "hf_efx" in names
        assert not names & {"torch", "peft", "transformers", "accelerate", "datasets", "numpy", "huggingface_hub"}


ORDER_PROGRAM = """
    import sys
    {imports}
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    print(AUTO_QUANTIZER_MAPPING["hf_efx"].__name__, AUTO_QUANTIZATION_CONFIG_MAPPING["hf_efx"].__name__)
    print("peft" in sys.modules, "hf_efx.core.model.adapter" in sys.modules)
    from transformers.pipelines import PIPELINE_REGISTRY
    print("translation-with-uncertainty" in PIPELINE_REGISTRY.get_supported_tasks(), "datasets" in sys.modules)
"""


@pytest.mark.parametrize(
    "imports",
    ["import hf_efx, transformers", "import transformers, hf_efx", "import transformers.quantizers.auto, hf_efx"],
    ids=["hf_efx first", "transformers first", "its registry first"],
)
def test_either_order_registers_the_loading(imports: str, run_python: Callable[..., str]) -> None:
    lines = run_python(ORDER_PROGRAM.format(imports=imports)).splitlines()
    assert lines == ["EfxQuantizer EfxConfig", "False False", "True False"]


@pytest.mark.parametrize("name", sorted(set(hf_efx.__all__) - {"__version__"}))
def test_public_name_is_there_and_described(name: str) -> None:
    value = getattr(hf_efx, name)
    assert value.__name__ == name and value.__module__.startswith("hf_efx.")
    assert value.__doc__ and inspect.getdoc(value) == inspect.cleandoc(value.__doc__)
    if inspect.isclass(value):
        assert "__doc__" in vars(value)  # its own, not a base class' or a dataclass' signature
        assert not value.__doc__.startswith(f"{name}(")
        for attribute, member in vars(value).items():
            if inspect.isfunction(member) and not attribute.startswith("_"):
                assert member.__doc__, f"{name}.{attribute}"


@pytest.mark.parametrize("package", [hf_efx, hf_efx.mc_dropout], ids=lambda package: package.__name__)
def test_names_agree_with_the_type_checker_s(package: Any) -> None:
    tree = ast.parse(Path(package.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING")
    checked = {alias.asname or alias.name for n in block.body if isinstance(n, ast.ImportFrom) for alias in n.names}
    assert checked == set(package.__all__) - {"__version__"}
    assert set(package.__all__) <= set(dir(package))


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hf_efx' has no attribute 'LowRnkConfig'"):
        hf_efx.LowRnkConfig  # noqa: B018  # pyright: ignore


def test_registry_s_classes_are_there() -> None:
    for method in METHODS.values():
        if method.config:
            module, _, name = method.config.rpartition(".")
            config = getattr(importlib.import_module(module), name)
            assert config.method == method.name
    assert sys.modules["hf_efx.low_rank"]


def test_package_is_typed() -> None:
    assert (PACKAGE / "py.typed").is_file()
