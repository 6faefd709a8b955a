"""Options of the fsdp backend: what script and launcher say, and what means nothing."""

import pytest
import torch
from torch import nn
from xtrain_backends.fsdp import FSDP

from xtrain import ConfigurationError, LightningModule, Trainer

ACCELERATE = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"reduce": "step"}, "reduce out of 'finalize', 'backward'. Received: 'step'"),
        ({"shard": "layer"}, "shard='layers', 'children' or a function. Received: 'layer'"),
        ({"offload": "disk"}, "offload out of None, 'cpu'. Received: 'disk'"),
        ({"mesh": {"model": 2}}, "axes 'data' and 'fsdp'. Received: {'model': 2}"),
        ({"mesh": {"data": 2}, "replicate": 4}, "mesh and replicate to agree"),
        ({"replicate": 0}, "replicate of at least 1. Received: 0"),
        ({"mixed": {"param": "float16"}}, "'bfloat16' or 'float32'. Received: 'param': 'float16'"),
    ],
)
def test_what_means_nothing_is_refused(options, says):
    with pytest.raises(ConfigurationError) as caught:
        FSDP(**options)
    assert says in str(caught.value)
    assert "Fix:  " in str(caught.value)


class Net(nn.Module):
    """Parameters of its own, and a layer."""

    def __init__(self, layers=1):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(layers))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Module(LightningModule):
    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()


def fit(module, precision="32-true", **options):
    quiet = {"logger": False, "enable_progress_bar": False, "max_epochs": 1}
    Trainer(backend="fsdp", backend_options=options or None, precision=precision, **quiet).fit(
        module, [torch.ones(2, 2)]
    )


@pytest.mark.parametrize(
    ("parts", "options", "says"),
    [
        ({"weight": nn.Parameter(torch.ones(2))}, {}, "whose 1 parameters all stay whole"),
        ({"net": Net()}, {"mesh": {"data": 3, "fsdp": 2}}, "that the 1 processes of the run fill"),
        ({"net": Net()}, {"replicate": 3}, "that the 1 processes of the run fill. Received: replicate=3"),
        ({"net": Net()}, {"methods": ["net.encode"]}, "methods of networks of Module. Received: 'net.encode'"),
        ({"net": nn.LazyLinear(2)}, {}, "net.weight, lazy"),
        ({"net": Net().to("meta")}, {}, "net.blocks.0.weight on meta"),
    ],
)
def test_modules_that_cannot_be_sharded(parts, options, says):
    with pytest.raises(ConfigurationError) as caught:
        fit(Module(**parts), **options)
    assert says in str(caught.value)


def test_two_policies_of_dtypes_are_refused():
    with pytest.raises(ConfigurationError, match="one policy of dtypes"):
        fit(Module(net=Net()), "bf16-mixed", mixed={"param": "bfloat16"})


def test_another_device_than_the_launcher_says(monkeypatch):
    for name, value in {**ACCELERATE, "ACCELERATE_USE_CPU": "yes"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigurationError, match="device='cuda', but ACCELERATE_USE_CPU=yes"):
        FSDP(device="cuda")


@pytest.mark.parametrize(
    ("variables", "name", "value"),
    [
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "offload", "cpu"),
        ({"FSDP_AUTO_WRAP_POLICY": "NO_WRAP"}, "shard", "children"),
        ({}, "shard", "layers"),
        (
            {"PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
            "axes",
            {"data": 2, "fsdp": 0},
        ),
    ],
)
def test_settings_of_accelerate_are_read(variables, name, value, monkeypatch):
    for variable, text in {**ACCELERATE, **variables}.items():
        monkeypatch.setenv(variable, text)
    assert getattr(FSDP(), name) == value


@pytest.mark.parametrize(
    ("variables", "groups"),
    [
        ({"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP", "FSDP_TRANSFORMER_CLS_TO_WRAP": "Linear"}, [True]),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP", "FSDP_MIN_NUM_PARAMS": "7"}, [False]),
    ],
)
def test_policies_of_accelerate(variables, groups, monkeypatch):
    for variable, text in {**ACCELERATE, **variables}.items():
        monkeypatch.setenv(variable, text)
    assert [FSDP().shard("net.blocks.0", block) for block in Net().blocks] == groups


@pytest.mark.parametrize(
    "variables",
    [
        {"FSDP_RESHARD_AFTER_FORWARD": "false"},
        {"FSDP_ACTIVATION_CHECKPOINTING": "true"},
        {"FSDP_IGNORED_MODULES": "head.*"},
        {"PARALLELISM_CONFIG_TP_SIZE": "2", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"},
    ],
)
def test_settings_that_are_not_followed(variables, monkeypatch):
    for variable, text in {**ACCELERATE, **variables}.items():
        monkeypatch.setenv(variable, text)
    with pytest.raises(ConfigurationError, match=next(iter(variables))):
        FSDP()


def test_spellings_of_lightning():
    assert Trainer(strategy="fsdp").backend.name == "fsdp"
    assert Trainer(strategy="fsdp_cpu_offload").backend.offload == "cpu"


def test_a_torch_without_the_names_is_told(monkeypatch):
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

    monkeypatch.delattr(FSDPParamGroup, "finalize_backward")
    reason = FSDP.available()
    assert "FSDPParamGroup.finalize_backward" in reason
    assert "pip install 'torch" in reason
