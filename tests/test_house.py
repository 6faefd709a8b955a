"""The house rules that no linter knows: arrows between folders, cost of an import, sizes, the public surface."""

import ast
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import xtrain
from xtrain.registry import registered_backends

ROOT = Path(__file__).resolve().parent.parent
CORE = sorted((ROOT / "xtrain").rglob("*.py"))
BACKENDS = sorted((ROOT / "backends").rglob("*.py"))
EXAMPLES = sorted((ROOT / "examples").rglob("*.py"))
CI = sorted((ROOT / "ci").rglob("*.py"))

PUBLIC = {
    "Backend",
    "BackendContractError",
    "BackendUnavailableError",
    "Callback",
    "Capabilities",
    "CheckpointError",
    "ConfigurationError",
    "LaunchError",
    "LightningDataModule",
    "LightningModule",
    "LightningOptimizer",
    "MissingDependencyError",
    "ModelCheckpoint",
    "NonFiniteLossError",
    "ProgressBar",
    "ProtocolError",
    "RankFailedError",
    "Trainer",
    "UnknownBackendError",
    "UnsupportedCombinationError",
    "XTrainError",
    "rank_zero_only",
    "register_backend",
    "seed_everything",
}


def by_path(paths: list[Path]):
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path) -> Iterator[str]:
    """Yield the full name of every module that `path` imports, at its top or inside a function."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from [module] if node.module else (f"{module}.{alias.name}" for alias in node.names)


# ---------------------------------------------------------------- arrows


@by_path(CORE)
def test_core_imports_no_backend(path):
    tops = {name.split(".")[0] for name in imported(path)}
    assert not tops & {"backends", "xtrain_backends", "torch_xla", "deepspeed", "accelerate"}


@by_path(BACKENDS)
def test_backend_imports_only_the_core_its_own_folder_and_the_eager_base(path):
    own = [name.split(".")[1] for name in imported(path) if name.split(".")[0] in ("backends", "xtrain_backends")]
    assert set(own) <= {"eager", path.relative_to(ROOT).parts[1]}
    assert not {name.split(".")[0] for name in imported(path)} & {"tests", "examples", "ci"}


@by_path(BACKENDS)
def test_one_backend_knows_torch_xla(path):
    """It is to be replaced by another package one day: then this folder changes."""
    if path.parent.name != "xla":
        assert "torch_xla" not in {name.split(".")[0] for name in imported(path)}


def in_a_circle(arrows: dict[str, set[str]]) -> list[str]:
    """Return the modules that import each other, and those that need them."""
    free: set[str] = set()
    while ready := {name for name, needs in arrows.items() if name not in free and not (needs & arrows.keys()) - free}:
        free |= ready
    return sorted(arrows.keys() - free)


@pytest.mark.parametrize("paths", [CORE, BACKENDS], ids=["xtrain", "backends"])
def test_no_import_circle_at_run_time(paths):
    """Imports for annotations only (under TYPE_CHECKING) and inside functions are no arrows at run time."""
    assert in_a_circle({module_name(path): set(imported_at_run_time(path)) for path in paths}) == []


def test_annotations_make_no_circle_but_back_to_the_trainer():
    """A module and callbacks speak of the Trainer that runs them; nobody else's annotations point up."""
    arrows = {module_name(path): set(imported_for_annotations(path)) for path in CORE}
    for name, needs in arrows.items():
        if name == "xtrain.module" or name.startswith("xtrain.callbacks"):
            needs -= {"xtrain.trainer", "xtrain.trainer.Trainer"}
    assert in_a_circle(arrows) == []
    rooms = [path for path in BACKENDS if path.stem != "__init__"]  # which hands its class on lazily
    assert in_a_circle({module_name(path): set(imported_for_annotations(path)) for path in rooms}) == []


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_at_run_time(path: Path) -> Iterator[str]:
    yield from names_imported(path, parse(path).body)


def imported_for_annotations(path: Path) -> Iterator[str]:
    """Yield what is imported at run time, and below ``if TYPE_CHECKING``."""
    body = parse(path).body
    checked = [node for node in body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    yield from names_imported(path, [*body, *(inner for node in checked for inner in node.body)])


def names_imported(path: Path, body: list[ast.stmt]) -> Iterator[str]:
    package = path.relative_to(ROOT).parts[:-1]
    for node in body:
        if isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*above, *([node.module] if node.module else [])])
            yield from {module, *(f"{module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


# ---------------------------------------------------------------- imports


def top_level_modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_import_loads_nothing_but_torch_and_the_standard_library():
    extra = top_level_modules_after("import xtrain") - top_level_modules_after("import torch")
    assert extra - sys.stdlib_module_names - {"xtrain", "xtrain_backends"} == set()


def test_import_loads_no_backend():
    code = "import sys, xtrain; print([m for m in sys.modules if m.startswith('xtrain_backends.')])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


NO_XLA = """
import importlib, pathlib, sys
class Refuse:
    def find_spec(self, name, *_):
        assert name.split(".")[0] != "torch_xla", f"{name} is imported unasked"
sys.meta_path.insert(0, Refuse())
import xtrain, xtrain.cli, xtrain.testing
from xtrain.launch.join import own_rank
for name in sys.argv[1:]:
    importlib.import_module(f"xtrain_backends.{name}")
assert own_rank() == 0
trainer = xtrain.Trainer("cpu", max_epochs=1)
assert trainer.is_global_zero
"""


def test_nothing_imports_torch_xla_before_its_backend_starts():
    """Merely importing it turns CPU runs of other libraries into XLA runs."""
    names = [module_name(path).partition(".")[2] for path in BACKENDS if path.parent.name != "backends"]
    names += [path.stem for path in BACKENDS if path.parent.name == "backends" and path.stem != "__init__"]
    done = subprocess.run([sys.executable, "-c", NO_XLA, *names], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_surface_is_frozen():
    assert set(xtrain.__all__) == PUBLIC
    assert all(hasattr(xtrain, name) for name in PUBLIC)


# ---------------------------------------------------------------- names


def branches(node: ast.AST) -> Iterator[ast.AST]:
    """Yield every comparison and case below `node`; an assert states a fact and decides nothing, so not its own."""
    if isinstance(node, ast.Compare | ast.MatchValue):
        yield node
    for child in () if isinstance(node, ast.Assert) else ast.iter_child_nodes(node):
        yield from branches(child)


@by_path([path for path in CORE if "compat" not in path.parts and "testing" not in path.parts])
def test_no_backend_is_named_outside_of_compat(path):
    """At any depth, not only in comparisons. `accelerator` is also an argument of the Trainer."""
    names = set(registered_backends()) - {"accelerator"}
    tree = parse(path)
    devices = {id(constant) for node in ast.walk(tree) for constant in devices_in(node)}
    constants = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and n.value in names]
    assert [(n.lineno, n.value) for n in constants if id(n) not in devices] == []


def devices_in(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what lies inside the arguments by which `node` names a device of torch, such as ``tensor.to("cpu")``."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".to", "torch.device")):
        yield from (part for argument in node.args for part in ast.walk(argument))
    elif isinstance(node, ast.keyword) and node.arg == "map_location":
        yield node.value


@by_path(CORE + EXAMPLES)
def test_no_branch_on_a_backend_name(path):
    """Decisions come from capabilities: a name in a comparison is a special case in disguise."""
    names = set(registered_backends()) | {"deepspeed", "tpu", "xla"}
    constants = [
        node for branch in branches(parse(path)) for node in ast.walk(branch) if isinstance(node, ast.Constant)
    ]
    assert [(node.lineno, node.value) for node in constants if node.value in names] == []


# ---------------------------------------------------------------- what is installed


def test_every_folder_with_code_is_installed():
    """The installer takes what the list names; a folder that is missing there would be missing in the wheel only."""
    (listed,) = re.findall(r"^packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in CORE + BACKENDS}
    assert set(re.findall(r'"(.+?)"', listed)) == {re.sub(r"^backends\b", "xtrain_backends", name) for name in folders}


ARCHAIC = re.compile(r"\b(likewise|see there|see above|the former|the latter|thereof|whereby)\b", re.IGNORECASE)


@by_path(CORE + BACKENDS + EXAMPLES + CI)
def test_sentences_are_plain(path):
    """A reader whose first language is another should not have to look up what a word refers to."""
    assert ARCHAIC.findall(path.read_text(encoding="utf-8")) == []


# ---------------------------------------------------------------- sizes


def functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1 - lines_of_example(node)
            yield f"{path.relative_to(ROOT)}:{node.lineno} {node.name}", lines


def lines_of_example(node: ast.AST) -> int:
    """Return how many lines of a docstring are its example: those are run as tests, and are not counted as code."""
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        return 0
    _, found, example = (ast.get_docstring(node) or "").partition("\n\nExample:\n")
    return example.count("\n") + 3 if found and ">>>" in example else 0


def examples_in(path: Path) -> int:
    return sum(map(lines_of_example, ast.walk(parse(path))))


@by_path(CORE + BACKENDS + EXAMPLES + CI)
def test_file_fits_its_reader(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) - examples_in(path) <= 350
    assert [(name, lines) for name, lines in functions(path) if lines > 60] == []


LIFE = ("contract", "optimizer", "life", "guard", "toggle", "precision", "scaler", "module")


def test_what_a_gradient_passes_through_is_read_in_an_afternoon():
    """At most 1,750 lines, examples aside."""
    paths = [*(ROOT / "xtrain" / f"{name}.py" for name in LIFE), ROOT / "backends" / "eager" / "backend.py"]
    lines = {str(p): len(p.read_text(encoding="utf-8").splitlines()) - examples_in(p) for p in paths}
    assert sum(lines.values()) <= 1750, lines


def test_functions_are_short():
    assert statistics.median(lines for path in CORE + BACKENDS for _, lines in functions(path)) <= 10
