"""What a step does by hand with parameters that ZeRO 3 keeps in shards: the right number, or an error with the line."""

import jobs
import pytest
import torch
from test_stages import PARTITIONED
from torch import nn
from torch.nn import functional

from xtrain import ProtocolError, Trainer


def decay(net, batch):
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.9)


def decay_data(net, batch):
    for p in net.parameters():
        p.data.mul_(0.9)


def decay_together(net, batch):
    torch._foreach_mul_([p.data for p in net.parameters()], 0.9)


def penalty(net, batch):
    return sum(p.square().sum() for p in net.parameters())


def orthogonal(net, batch):
    return (net[0].weight @ net[0].weight.T - torch.eye(8)).square().sum()


def layer_by_hand(net, batch):
    return functional.linear(batch, net[0].weight).square().mean()


def vector(net, batch):
    return nn.utils.parameters_to_vector(net.parameters()).square().sum()


def measured(net, batch):
    net.kept = float(sum(p.detach().abs().sum() for p in net.parameters()))


def averaged(net, batch):
    net.kept = [torch.zeros(p.shape).lerp(p.detach(), 0.5).sum().item() for p in net.parameters()]


class ByHand(jobs.Regression):
    """Does something with the parameters before the backward, inside `full_parameters` or without."""

    def __init__(self, work, whole):
        super().__init__(network())
        self.work, self.whole = work, whole

    def training_step(self, batch, batch_idx):
        opt = self.optimizers()
        opt.zero_grad()
        if self.whole:
            with self.trainer.backend.full_parameters(self.net):
                self.train_on(batch)
        else:
            self.train_on(batch)
        opt.step()

    def train_on(self, batch):
        extra = self.work(self.net, batch)
        loss = self.net(batch).square().mean()
        self.manual_backward(loss if extra is None else loss + extra)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))


DATA = [torch.randn(4, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
WORKS = [decay, decay_data, decay_together, penalty, orthogonal, layer_by_hand, vector, measured, averaged]


def trained(module):
    Trainer("deepspeed", backend_options=PARTITIONED, max_epochs=1, enable_progress_bar=False).fit(module, DATA)
    return module.net


@pytest.mark.parametrize("work", WORKS)
def test_it_is_refused_with_the_line_and_as_in_torch_inside_full_parameters(work):
    module = ByHand(work, whole=False)
    with pytest.raises(
        ProtocolError, match=r"(?s)a whole net\.\d\.weight to read.*full_parameters\(self.net\): "
    ) as caught:
        trained(module)
    assert str(caught.value).split("full_parameters(self.net): ")[1][:3] != "...", "the line of the user"
    expected = network()
    optimizer = torch.optim.SGD(expected.parameters(), lr=0.05)
    for batch in DATA:
        optimizer.zero_grad()
        extra = work(expected, batch)
        loss = expected(batch).square().mean()
        (loss if extra is None else loss + extra).backward()
        optimizer.step()
    found = trained(ByHand(work, whole=True))
    for ours, theirs in zip(found.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert getattr(found, "kept", None) == pytest.approx(getattr(expected, "kept", None))


def test_shapes_and_numbers_of_elements_are_those_of_the_whole():
    class Counting(jobs.Regression):
        def on_train_batch_start(self, batch, batch_idx):
            self.seen = [(p.shape, p.ndim, p.dim(), p.size(), p.size(0), p.numel()) for p in self.net.parameters()]
            self.told = [(p.dtype, p.device.type, p.requires_grad, p.grad is None) for p in self.net.parameters()]

    module = Counting(network())
    trained(module)
    assert module.seen == [(p.shape, p.ndim, p.dim(), p.size(), p.size(0), p.numel()) for p in network().parameters()]
    assert {told[:3] for told in module.told} == {(torch.float32, "cpu", True)}


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_before_zero_grad"])
def test_hooks_are_guarded_too(hook):
    module = jobs.Regression(network())
    setattr(module, hook, lambda *args: [p.sum() for p in module.net.parameters()])
    with pytest.raises(ProtocolError, match=r"a whole net\.0\.weight to read"):
        trained(module)
    assert module.net[0].weight.shape == (8, 3)
    assert module.net[0].weight.sum() != 0, "after the run nobody is in the way"
