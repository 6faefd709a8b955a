"""The registry: names, lazy imports, validation, and every message a wrong name or class leads to."""

import subprocess
import sys
from pathlib import Path
from typing import Any, final

import pytest
import torch

from xtrain import Trainer, sources
from xtrain.contract import Backend, Capabilities
from xtrain.errors import (
    BackendContractError,
    ConfigurationError,
    MissingDependencyError,
    UnknownBackendError,
)
from xtrain.life import GradientLife
from xtrain.optimizer import LightningOptimizer
from xtrain.registry import get_backend_class, make_backend, register_backend, registered_backends, validate_backend
from xtrain.tables import render_availability, render_matrix, render_rules

ROOT = Path(__file__).resolve().parent.parent


class Template(Backend):
    """Fulfils the contract and does nothing."""

    name = "complete"
    capabilities = Capabilities(precisions=frozenset({"32-true"}))

    def __init__(self, stage: int = 0, *, offload: str | None = None) -> None:
        self.stage, self.offload = stage, offload

    @classmethod
    def available(cls):
        return None

    def launch(self): ...
    def setup_module(self, module): ...
    def setup_optimizers(self, module, optimizers): ...
    def zero_grad(self, optimizer, set_to_none=True): ...
    def backward(self, loss, *args, **kwargs): ...
    def finalize_gradients(self, optimizer): ...
    def clip_gradients(self, optimizer, value, algorithm): ...
    def step(self, optimizer, closure=None, **kwargs): ...
    def step_boundary(self): ...


def complete(class_name: str = "Complete", **overrides: Any) -> type[Backend]:
    """Return a fresh copy of `Template` with `overrides` in place; None drops an attribute."""
    members = {**vars(Template), **overrides}
    kept = {k: v for k, v in members.items() if v is not None and k not in ("__abstractmethods__", "_abc_impl")}
    return final(type(Backend)(class_name, (Backend,), kept))


@pytest.fixture
def third_party(tmp_path, monkeypatch):
    """Install a distribution (`acme` 1.0) with entry points; returns a function that takes table and modules."""

    def install(entries: str, dist: str = "acme", **modules: str) -> None:
        info = tmp_path / f"{dist}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\nProvides-Extra: chip\n")
        (info / "entry_points.txt").write_text(f"[xtrain.backends]\n{entries}\n")
        for name, code in modules.items():
            (tmp_path / f"{name}.py").write_text(code)
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.syspath_prepend(tmp_path)

    return install


# ---------------------------------------------------------------- where gradients are


def test_gradients_are_looked_for_where_a_backend_keeps_its_parameters():
    whole, shard = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    backend = complete(parameters_of=lambda self, optimizer: [whole])()
    optimizer = LightningOptimizer(torch.optim.SGD([shard], lr=0.1), GradientLife(backend, {}))
    shard.grad = torch.ones(2)
    assert not backend.has_gradients(optimizer)
    whole.grad = torch.ones(2)
    assert backend.has_gradients(optimizer)


# ---------------------------------------------------------------- names


def test_built_in_backends_are_listed_without_importing_them():
    code = "import sys; from xtrain.registry import registered_backends as r; print(r()['cpu'], r()['cuda']);"
    code += "print([m for m in sys.modules if m.startswith('xtrain_backends.')])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert out.split("\n")[:2] == ["xtrain_backends.cpu:CPU xtrain_backends.cuda:CUDA", "[]"]


def test_checkout_works_without_an_install(tmp_path):
    """With -S Python runs no .pth file, so an editable install's import hook is not there to help."""
    code = f"import sys; sys.path += [{str(ROOT)!r}, {str(Path(torch.__file__).parent.parent)!r}]\n"
    code += "from xtrain.registry import get_backend_class\n"
    code += "print(get_backend_class('cpu').__module__, sys.modules['xtrain_backends'].__path__)"
    run = subprocess.run([sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.stdout == f"xtrain_backends.cpu ['{ROOT / 'backends'}']\n", run.stderr


def test_unknown_name_lists_the_registered_ones_and_the_closest():
    with pytest.raises(UnknownBackendError) as caught:
        get_backend_class("CUDAA")
    text = str(caught.value)
    assert "'cpu', 'cuda'" in text
    assert "Received: 'CUDAA'" in text
    assert "Trainer(backend='cuda')" in text


def test_third_party_entry_point_is_loaded_lazily_and_validated(third_party):
    third_party("chip = acme_chip:Chip", acme_chip="raise RuntimeError('imported too early')")
    assert registered_backends()["chip"] == "acme_chip:Chip"
    with pytest.raises(BackendContractError, match="imported too early"):
        get_backend_class("chip")


def test_entry_point_that_is_no_backend(third_party):
    third_party("chip = acme_bad:Chip\ngone = acme_bad:Gone\nlost = acme_lost:Lost", acme_bad="class Chip: pass")
    with pytest.raises(BackendContractError, match=r"subclass of xtrain.contract.Backend. Received: <class 'acme_bad"):
        get_backend_class("chip")
    with pytest.raises(BackendContractError, match=r"gone = acme_bad:Gone of acme 1.0 .* AttributeError"):
        get_backend_class("gone")
    with pytest.raises(BackendContractError, match=r"lost = acme_lost:Lost of acme 1.0 .* ModuleNotFoundError"):
        get_backend_class("lost")


BREAKS = {
    "raises": ("raise RuntimeError('no driver')", "RuntimeError: no driver"),
    "exits": ("import sys; sys.exit(7)", "SystemExit: 7"),
    "is no Python": ("class", "SyntaxError"),
    "is no class": ("Chip = 3", "subclass of xtrain.contract.Backend"),
}


@pytest.mark.parametrize(("code", "said"), BREAKS.values(), ids=BREAKS)
def test_a_package_that_breaks_is_named_and_harms_its_own_row_only(third_party, code, said):
    third_party("chip = acme_breaks:Chip", acme_breaks=code)
    with pytest.raises(BackendContractError) as caught:
        get_backend_class("chip")
    for part in ("chip = acme_breaks:Chip of acme 1.0", said, "pip uninstall acme"):
        assert part in str(caught.value)
    assert f"`chip` | broken: {caught.value}".splitlines()[0] in render_availability()
    assert "`cpu`" in render_matrix()
    assert render_rules()


def test_a_package_whose_backend_breaks_when_it_is_asked_harms_its_own_row_only(third_party):
    code = "from test_registry import *\nclass Chip(Template):\n name = 'chip'\n"
    code += " @classmethod\n def available(cls): raise OSError('driver')"
    third_party("chip = acme_asks:Chip", acme_asks=code)
    assert "`chip` | broken: OSError: driver" in render_availability()


@pytest.mark.parametrize("value", ["acme_cpu:CPU", "xtrain_backends.evil:CPU"])
@pytest.mark.parametrize("checkout", [True, False], ids=["checkout", "wheel"])
def test_installed_package_cannot_take_over_a_built_in_name(third_party, monkeypatch, tmp_path, value, checkout):
    if not checkout:
        monkeypatch.setattr(sources, "_TABLE", tmp_path / "none")
        third_party("cpu = xtrain_backends.cpu:CPU", dist="xtrain_torch")
    third_party(f"cpu = {value}", acme_cpu="")  # found before ours
    assert registered_backends()["cpu"] == "xtrain_backends.cpu:CPU"
    assert get_backend_class("cpu").__module__ == "xtrain_backends.cpu"
    assert "`cpu (acme 1.0)` | broken: Expected one package that offers backend 'cpu'" in render_availability()


def test_two_packages_that_offer_one_name_are_both_named(third_party):
    third_party("chip = acme_one:Chip", acme_one="raise AssertionError")
    third_party("chip = acme_two:Chip", dist="other", acme_two="raise AssertionError")
    with pytest.raises(BackendContractError, match=r"acme 1.0 and other 1.0|other 1.0 and acme 1.0") as caught:
        get_backend_class("chip")
    assert "pip uninstall" in str(caught.value)
    assert "chip" not in registered_backends()
    assert "`chip (acme 1.0)`" in render_availability()


@pytest.mark.parametrize("name", ["auto", "Chip"])
def test_names_that_could_never_be_asked_for_are_broken(third_party, name):
    third_party(f"{name} = acme_chip:Chip", acme_chip="")
    assert name not in registered_backends()
    assert f"`{name} (acme 1.0)` | broken: Expected a lower-case name other than 'auto'" in render_availability()


def test_another_project_of_the_same_import_name_is_told(third_party):
    third_party("", dist="xtrain")
    sources.warn_of_namesake.cache_clear()
    with pytest.warns(UserWarning, match=r"xtrain 1.0, another project.*\nFix:  pip uninstall xtrain"):
        make_backend("cpu")


@pytest.mark.parametrize(
    ("name", "pip"), [("chip", "pip install 'acme[chip]'"), ("other", "pip install absent_package")]
)
def test_missing_dependency_gives_the_pip_line_and_the_cause(third_party, name, pip):
    third_party("chip = acme_lazy:Chip\nother = acme_lazy:Chip", acme_lazy="import absent_package.inner")
    with pytest.raises(MissingDependencyError) as caught:
        get_backend_class(name)
    assert str(caught.value).endswith(f"Fix:  {pip}")
    assert "No module named 'absent_package'" in str(caught.value)
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_built_in_backend_with_a_missing_dependency_names_the_extra(tmp_path, monkeypatch):
    (tmp_path / "lacking.py").write_text("import absent_package")
    (tmp_path / "entry_points.ini").write_text("[xtrain.backends]\ntpu = lacking:TPU\n")
    monkeypatch.setattr(sources, "_TABLE", tmp_path / "entry_points.ini")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingDependencyError, match=r"pip install 'xtrain-torch\[tpu\]'"):
        get_backend_class("tpu")


# ---------------------------------------------------------------- registration in code


def test_registered_class_is_found_and_made():
    cls = register_backend(complete())
    assert get_backend_class("complete") is cls
    assert registered_backends()["complete"].endswith(":Complete")
    backend = make_backend("complete", {"stage": 3})
    assert (type(backend), backend.stage) == (cls, 3)


def test_registering_twice_is_harmless_but_a_taken_name_is_refused():
    cls = register_backend(complete())
    assert register_backend(cls) is cls
    with pytest.raises(BackendContractError, match=r"still free. Received: 'cpu', taken by xtrain_backends.cpu:CPU"):
        register_backend(complete("Other", name="cpu"))


def test_invalid_class_is_not_registered():
    with pytest.raises(BackendContractError):
        register_backend(complete(step=None))
    assert "complete" not in registered_backends()


# ---------------------------------------------------------------- make_backend


def test_instance_is_taken_as_it_is():
    backend = complete()()
    assert make_backend(backend) is backend


def test_options_beside_an_instance_are_refused():
    with pytest.raises(ConfigurationError, match=r"Trainer\(backend=Complete\(stage=3\)\)"):
        make_backend(complete()(), {"stage": 3})


@pytest.mark.parametrize("backend", [None, 3, complete()])
def test_neither_name_nor_instance(backend):
    with pytest.raises(ConfigurationError, match="name or an instance"):
        make_backend(backend)


def test_unknown_option_lists_the_accepted_ones_and_the_closest():
    register_backend(complete())
    with pytest.raises(ConfigurationError) as caught:
        make_backend("complete", {"ofload": "cpu"})
    text = str(caught.value)
    assert "backend_options of 'complete' out of: stage=0, offload=None" in text
    assert "{'ofload': 'cpu'}" in text
    assert "backend_options={'offload': ...}" in text


# ---------------------------------------------------------------- validation


def test_complete_class_is_valid():
    cls = complete()
    assert validate_backend(cls) is cls


def test_missing_methods_are_all_listed_with_their_signature():
    with pytest.raises(BackendContractError) as caught:
        validate_backend(complete(step=None, available=None))
    assert "Expected a method step(self, optimizer, closure=None, **kwargs). Received: none." in str(caught.value)
    assert "Expected a method classmethod available(). Received: none." in str(caught.value)


WRONG = {
    "renamed parameter": (
        {"step": lambda self, opt, closure=None, **kwargs: None},
        "Expected step(self, optimizer, closure=None, **kwargs). Received: step(self, opt, closure=None, **kwargs).",
    ),
    "lost default": (
        {"zero_grad": lambda self, optimizer, set_to_none: None},
        "Expected zero_grad(self, optimizer, set_to_none=True). Received: zero_grad(self, optimizer, set_to_none).",
    ),
    "other kind": (
        {"clip_gradients": lambda self, optimizer, *, value, algorithm: None},
        "Received: clip_gradients(self, optimizer, *, value, algorithm).",
    ),
    "instance method for a classmethod": (
        {"available": lambda self: None},
        "Expected classmethod available(). Received: available(self).",
    ),
    "default method": (
        {"batch_to_device": lambda self, data: data},
        "Expected batch_to_device(self, batch). Received: batch_to_device(self, data).",
    ),
    "not a method": ({"launch": 3}, "Expected launch(self). Received: launch = 3."),
    "name": ({"name": "Complete"}, "Expected name to be a lower-case str other than 'auto'. Received: 'Complete'."),
    "capabilities": ({"capabilities": {"32-true"}}, "Expected capabilities to be an xtrain.contract.Capabilities."),
    "unknown precision": (
        {"capabilities": Capabilities(precisions=frozenset({"32-true", "fp7"}))},
        "bf16-true, 16-true. Received: ['fp7'].",
    ),
    "no precision": ({"capabilities": Capabilities(precisions=frozenset())}, "Received: none."),
}


@pytest.mark.parametrize(("overrides", "message"), WRONG.values(), ids=WRONG)
def test_offending_attribute_is_quoted(overrides, message):
    with pytest.raises(BackendContractError) as caught:
        validate_backend(complete(**overrides))
    assert message in str(caught.value)
    assert str(caught.value).count("\n") == 1, "exactly one problem is reported"


@pytest.mark.parametrize("thing", [None, int, "cpu", Backend.__mro__[-1]])
def test_something_else_is_no_backend(thing):
    with pytest.raises(BackendContractError, match=r"subclass of xtrain.contract.Backend. Received"):
        validate_backend(thing)


def test_every_registered_backend_fulfils_the_contract():
    for name in registered_backends():
        assert issubclass(get_backend_class(name), Backend)


# ---------------------------------------------------------------- spellings and "auto"

CHIP = """
from typing import final
from xtrain_backends.cpu import CPU
from xtrain_backends.eager import EagerBackend
@final
class Chip(EagerBackend):
    name, capabilities, in_auto = "chip", CPU.capabilities, True
    spellings = {"chip_sharded": {"timeout": 7.0}}
    @classmethod
    def available(cls):
        return None
    def launch(self):
        self._join("gloo")
"""


def test_a_backend_of_another_package_brings_spellings_and_takes_part_in_auto(third_party):
    third_party("chip = chip_module:Chip", chip_module=CHIP)
    trainer = Trainer(strategy="chip_sharded")
    assert (trainer.backend.name, trainer.backend.timeout.total_seconds()) == ("chip", 7.0)
    assert Trainer(accelerator="chip_sharded", backend_options={"timeout": 7.0}).backend.name == "chip"
    auto = Trainer(backend="auto")
    assert auto.backend.name == "chip"
    assert "backend=chip (found on this machine)" in auto.origin


def test_auto_passes_over_a_chip_that_is_not_there_and_a_package_that_breaks(third_party):
    absent = CHIP.replace("return None", "return 'no chip is plugged in'")
    third_party("chip = chip_module:Chip\nbroken = broken_module:Broken", chip_module=absent, broken_module="1 / 0")
    assert Trainer(backend="auto").backend.name in ("cpu", "cuda")


def test_what_nobody_understands_is_refused(third_party):
    third_party("chip = chip_module:Chip", chip_module=CHIP)
    with pytest.raises(ConfigurationError, match="strategy out of"):
        Trainer(strategy="chip_replicated")
