"""More hand-written loops: odd parameters, backward's arguments, automatic optimization, evaluation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim.lr_scheduler import ExponentialLR

from xtrain.testing.networks import HIDDEN, adam, batches, d_loss, g_loss, regression, sgd
from xtrain.testing.oracle import Plain, accumulate, by_norm, forward_regression, gan_optimizers, one_optimizer


def keep_zeros(run: Plain) -> None:
    """``zero_grad(set_to_none=False)``: G has zeros, not None, where its loss is left out, and still steps."""
    g_opt, d_opt = gan_optimizers(run)
    for _, _, (x, z) in run.steps():
        for opt in (g_opt, d_opt):
            opt.zero_grad(set_to_none=False)
        with run.forward_context():
            fake = run.G(z)
            loss = d_loss(run.D, x, fake) + g_loss(run.D, fake)
        run.backward(loss)
        g_opt.step()
        d_opt.step()
        d_opt.zero_grad(set_to_none=False)
        run.note(left=[p.grad.abs().sum() for p in run.D.parameters() if p.grad is not None])


def keep_gradients(run: Plain) -> None:
    """Gradients that are not zeroed after a step still count in the next one."""
    opt = one_optimizer(run)
    for _, index, batch in run.steps():
        if index % 3 == 0:
            opt.zero_grad()
        run.backward(forward_regression(run, batch) / 3)
        run.note(norm=by_norm(list(run.D.parameters())))
        opt.step()


def retain_graph(run: Plain) -> None:
    """Two backwards through one graph."""
    opt = one_optimizer(run)
    for _, _, batch in run.steps():
        loss = forward_regression(run, batch) / 2
        opt.zero_grad()
        run.backward(loss, retain_graph=True)
        run.backward(loss)
        opt.step()


def gradient_argument(run: Plain) -> None:
    """The loss is weighted by the gradient given to its backward."""
    opt = one_optimizer(run)
    for _, _, batch in run.steps():
        loss = forward_regression(run, batch)
        opt.zero_grad()
        run.backward(loss, gradient=torch.full_like(loss, 0.5))
        opt.step()


def inputs_argument(run: Plain) -> None:
    """``inputs=`` keeps G's loss away from the gradients that D accumulates."""
    g_opt, d_opt = gan_optimizers(run)
    for _, index, (x, z) in run.steps():
        with run.forward_context():
            fake = run.G(z)
            err_d, err_g = d_loss(run.D, x, fake) / 2, g_loss(run.D, fake)
        run.backward(err_d)
        g_opt.zero_grad()
        run.backward(err_g, inputs=list(run.G.parameters()))
        g_opt.step()
        if (index + 1) % 2 == 0:
            d_opt.step()
            d_opt.zero_grad()


def sum_of_losses(run: Plain) -> None:
    """A backward per loss, one step for both."""
    opt = one_optimizer(run)
    for _, _, (x, z) in run.steps():
        opt.zero_grad()
        for k in (1, 2):
            with run.forward_context():
                loss = regression(run.D, x * k, z) / 2
            run.backward(loss)
        run.note(norm=by_norm(list(run.D.parameters())))
        opt.step()


def gradient_penalty(run: Plain) -> None:
    """A loss that holds a gradient of its own: differentiated twice, as in WGAN-GP."""
    opt = one_optimizer(run)
    for _, _, (x, _) in run.steps():
        x = x.clone().requires_grad_()
        with run.forward_context():
            score = run.D(x).sum()
            (slope,) = torch.autograd.grad(score, x, create_graph=True)
            loss = (slope.norm(dim=1) - 1.0).square().mean()
        opt.zero_grad()
        run.backward(loss)
        opt.step()


def no_grad_first(run: Plain) -> None:
    """A forward without gradients comes before the one that trains, in the same step."""
    opt = one_optimizer(run)
    for _, _, (x, z) in run.steps():
        with torch.no_grad(), run.forward_context():
            target = run.D(x).detach()
        with run.forward_context():
            loss = regression(run.D, x + target, z)
        opt.zero_grad()
        run.backward(loss)
        opt.step()


def tied(run: Plain) -> None:
    """One weight matrix in two layers of the same optimizer."""
    layer = run.D.first
    run.back = back = nn.Linear(HIDDEN, 4).to(run.device, run.dtype)
    back.bias.data.zero_()
    opt = sgd([*run.D.parameters(), back.bias])
    run.owns(opt)
    for _, _, (x, z) in run.steps():
        with run.forward_context():
            hidden = torch.tanh(layer(x))
            rebuilt = nn.functional.linear(hidden, layer.weight.t(), back.bias)
            loss = nn.functional.mse_loss(rebuilt, x) + regression(run.D, x, z)
        opt.zero_grad()
        run.backward(loss)
        run.note(norm=by_norm([*run.D.parameters(), back.bias]), tied=True)
        opt.step()
        run.note(bias=back.bias.detach().clone())


def shared_layer(run: Plain) -> None:
    """D's first layer belongs to both optimizers, which step one after the other."""
    pair = sgd([*run.G.parameters(), *run.D.first.parameters()]), adam(run.D.parameters())
    run.owns(*pair)
    for _, _, (x, z) in run.steps():
        for opt, on_d in zip(pair, (False, True), strict=True):
            with run.forward_context():
                fake = run.G(z)
                loss = d_loss(run.D, x, fake) if on_d else g_loss(run.D, fake)
            opt.zero_grad()
            run.backward(loss)
            opt.step()


def temperature(run: Plain) -> None:
    """A learned scalar without dimensions, under an optimizer of its own."""
    run.temperature = scalar = nn.Parameter(torch.tensor(0.5, device=run.device, dtype=run.dtype))
    groups = list(run.D.parameters()), [scalar]
    pair = sgd(groups[0]), sgd(groups[1])
    run.owns(*pair)
    for _, _, (x, z) in run.steps():
        with run.forward_context():
            loss = nn.functional.mse_loss(run.D(x).squeeze(1) * scalar, z.sum(1))
        for opt in pair:
            opt.zero_grad()
        run.backward(loss)
        for opt, group in zip(pair, groups, strict=True):
            run.note(norm=by_norm(group))
            opt.step()
        run.note(temperature=scalar.detach().clone())


def unowned(run: Plain) -> None:
    """G's first bias is frozen though an optimizer holds it; D's last layer trains in no optimizer."""
    run.G.first.bias.requires_grad_(False)
    pair = sgd(run.G.parameters()), adam(run.D.first.parameters())
    run.owns(*pair)
    for _, _, (_, z) in run.steps():
        with run.forward_context():
            loss = regression(run.D, run.G(z), z)
        for opt in pair:
            opt.zero_grad()
        run.backward(loss)
        run.note(norm=by_norm([p for p in run.G.parameters() if p.requires_grad]))
        for opt in pair:
            opt.step()


def parameter_groups(run: Plain) -> None:
    """Two groups with their own learning rates; the norm is that of both together."""
    opt = adam([{"params": run.D.first.parameters()}, {"params": run.D.last.parameters(), "lr": 0.005}])
    run.owns(opt)
    for _, _, batch in run.steps():
        opt.zero_grad()
        run.backward(forward_regression(run, batch))
        run.note(norm=by_norm(list(run.D.parameters())), lr=[g["lr"] for g in opt.param_groups])
        opt.step()


def automatic(run: Plain, every: int = 1, algorithm: str | None = None, step_interval: bool = False) -> None:
    """What automatic optimization stands for; an incomplete window of accumulation steps at the epoch's end."""
    opt = one_optimizer(run)
    scheduler = ExponentialLR(opt, 0.7)
    parameters = list(run.D.parameters())
    for _, index, batch in run.steps():
        run.note(lr=opt.param_groups[0]["lr"])
        last = index + 1 == len(run.data)
        run.backward(forward_regression(run, batch) / every)
        if (index + 1) % every and not last:
            continue
        if algorithm == "norm":
            clip_grad_norm_(parameters, 0.2)
        elif algorithm == "value":
            clip_grad_value_(parameters, 0.03)
        opt.step()
        opt.zero_grad()
        if (step_interval and (index + 1) % 2 == 0) or (last and not step_interval):
            scheduler.step()


def with_validation(run: Plain) -> None:
    """Gradients accumulated over two batches survive the validation in between; G is the user's to keep in eval."""
    opt = one_optimizer(run)
    run.G.eval()
    like = run.data[0][0]
    held_out = [(x.to(like), z.to(like)) for x, z in batches(2, seed=5)]
    for _, index, batch in run.steps():
        run.note(modes=[run.training, run.G.training, run.D.training, torch.is_grad_enabled()])
        run.backward(forward_regression(run, batch) / 2)
        if (index + 1) % 2 == 0:
            opt.step()
            opt.zero_grad()
        losses = []
        for held in held_out:
            run.note(validation_modes=[False, False, False, False])
            with torch.no_grad():
                losses.append(forward_regression(run, held).float())
        run.note(validation_loss=torch.stack(losses).mean())


def predictions(run: Plain) -> list[Tensor]:
    """Return D's outputs for the data, without gradients, in the run's precision."""
    run.eval()
    with torch.no_grad(), run.forward_context():
        return [run.D(x) for x, _ in run.data]


def evaluation_loss(run: Plain) -> Any:
    """Return the mean loss over the data, without gradients, in the run's precision."""
    run.eval()
    with torch.no_grad():
        return torch.stack([forward_regression(run, batch).float() for batch in run.data]).mean()


def accumulate_once(run: Plain) -> None:
    """The plainest loop there is."""
    accumulate(run, every=1)


def raw_optimizer(run: Plain) -> None:
    """Steps of the user's own optimizer are invisible to the counters."""
    opt = sgd(run.D.parameters())
    run.step_count = [0]
    for _, _, batch in run.steps():
        opt.zero_grad()
        run.backward(forward_regression(run, batch) / 2)
        opt.step()


def no_loader(run: Plain) -> None:
    """The training step makes its own data out of the index."""
    pair = gan_optimizers(run)
    for _, index, _ in run.steps():
        z = torch.full((4, 3), 0.25 * (index + 1), device=run.device, dtype=run.dtype)
        with run.forward_context():
            loss = regression(run.D, run.G(z), z)
        for opt in pair:
            opt.zero_grad()
        run.backward(loss)
        for opt in pair:
            opt.step()
