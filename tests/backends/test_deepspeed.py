"""The deepspeed backend, held to the conformance suite; more processes and stages: tests/zero."""

import torch

from xtrain.testing import BackendConformance
from xtrain.testing.experiments.closures import Closure
from xtrain.testing.misuse import Provocation


def frozen(parameters):
    parameters = list(parameters)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return torch.optim.SGD(parameters, lr=0.1)


def with_state(parameters):
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    first = optimizer.param_groups[0]["params"][0]
    optimizer.state[first]["momentum_buffer"] = torch.ones_like(first)
    return optimizer


class TestDeepSpeed(BackendConformance):
    backend = "deepspeed"
    precisions = ("32-true", "bf16-mixed", "16-mixed", "bf16-true")
    direct_calls = False
    sequence_examples = 30
    provocations = {
        "deepspeed-adagrad": Provocation(lambda: Closure(torch.optim.Adagrad)),
        "deepspeed-flat": Provocation(lambda: Closure(torch.optim.Adafactor)),
        "deepspeed-frozen": Provocation(lambda: Closure(frozen)),
        "deepspeed-state": Provocation(lambda: Closure(with_state)),
    }
