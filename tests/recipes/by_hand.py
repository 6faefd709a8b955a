"""The training loops of the recipes in plain PyTorch, as anyone would write them: what three steps must come to."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cosine_similarity, normalize, softplus
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR


def gan(m, batches):
    opt_g = torch.optim.Adam(m.generator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    opt_d = torch.optim.Adam(m.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.99))
    for real, labels in batches:
        fake = m.generator(torch.randn(len(labels), 32), labels)
        opt_d.zero_grad()
        (softplus(-m.discriminator(real, labels)) + softplus(m.discriminator(fake.detach(), labels))).mean().backward()
        clip_grad_norm_(m.discriminator.parameters(), 1.0)
        opt_d.step()
        opt_g.zero_grad()
        softplus(-m.discriminator(fake, labels)).mean().backward()
        clip_grad_norm_(m.generator.parameters(), 1.0)
        opt_g.step()


def wgan_gp(m, batches):
    opt_g = torch.optim.Adam(m.generator.parameters(), lr=5e-4, betas=(0.5, 0.9))
    opt_c = torch.optim.Adam(m.critic.parameters(), lr=5e-4, betas=(0.5, 0.9))
    for index, (real, _) in enumerate(batches):
        fake = m.generator(torch.randn(len(real), 32)).detach()
        loss = m.critic(fake).mean() - m.critic(real).mean()
        mix = torch.rand(len(real), 1, 1, 1)
        between = torch.lerp(fake, real, mix).requires_grad_()
        (slope,) = torch.autograd.grad(m.critic(between).sum(), between, create_graph=True)
        opt_c.zero_grad()
        (loss + 10 * ((slope.square().sum(dim=(1, 2, 3)).sqrt() - 1) ** 2).mean()).backward()
        opt_c.step()
        if index % 5 == 4:
            opt_g.zero_grad()
            (-m.critic(m.generator(torch.randn(len(real), 32)))).mean().backward()
            opt_g.step()


def sparse_coding(m, batches):
    optimizer = torch.optim.Adam(m.dictionary.parameters(), lr=0.1)
    schedule = CosineAnnealingLR(optimizer, len(batches))
    for patches in batches:
        atoms = normalize(m.dictionary.weight, dim=1)
        codes = ista(atoms.detach(), patches, 0.3)
        optimizer.zero_grad()
        (0.5 * (patches - codes @ atoms).square().sum() / len(patches)).backward()
        optimizer.step()
        schedule.step()


def ista(atoms, patches, penalty):
    """Fifty steps of FISTA with the same step size, from its definition."""
    gram = atoms @ atoms.T
    vector = torch.ones(len(gram))
    for _ in range(20):
        vector = gram @ vector
        vector = vector / vector.norm()
    size = 1 / (1.05 * vector @ gram @ vector)
    x = y = torch.zeros(len(patches), len(atoms))
    for k in range(50):
        moved = y - size * (y @ gram - patches @ atoms.T)
        new = torch.nn.functional.softshrink(moved, float(size * penalty))
        x, y = new, new + k / (k + 3) * (new - x)
    return x


def cyclegan(m, batches):
    ab, ba, db, da = m.to_bold, m.to_plain, m.sees_bold, m.sees_plain
    nets = [[*ab.parameters(), *ba.parameters()], [*db.parameters(), *da.parameters()]]
    opt_t, opt_d = (torch.optim.Adam(parameters, lr=5e-4, betas=(0.5, 0.999)) for parameters in nets)
    schedules = [LinearLR(opt, 1.0, 0.05, total_iters=len(batches)) for opt in (opt_t, opt_d)]
    pools = {}
    for batch in batches:
        (a,), (b,) = batch["plain"], batch["bold"]
        fake_b, fake_a = ab(a), ba(b)
        cycle = (ba(fake_b) - a).abs().mean() + (ab(fake_a) - b).abs().mean()
        loss = ((db(fake_b) - 1) ** 2).mean() + ((da(fake_a) - 1) ** 2).mean() + 10 * cycle
        opt_t.zero_grad()
        loss.backward()
        opt_t.step()
        old_b, old_a = exchange(pools, "b", fake_b.detach()), exchange(pools, "a", fake_a.detach())
        loss = ((db(b) - 1) ** 2).mean() + (db(old_b) ** 2).mean() + ((da(a) - 1) ** 2).mean() + (da(old_a) ** 2).mean()
        opt_d.zero_grad()
        (0.5 * loss).backward()
        opt_d.step()
        for schedule in schedules:
            schedule.step()


def exchange(pools, name, fakes):
    """Each fake is shown or, with probability 1/2, changes places with an old one."""
    pool = pools.setdefault(name, fakes.repeat(256 // len(fakes), 1, 1, 1))
    places, coins = torch.randperm(256)[: len(fakes)], torch.rand(len(fakes), 1, 1, 1).flatten() < 0.5
    shown = fakes.clone()
    for i, place in enumerate(places.tolist()):
        if not coins[i]:
            shown[i] = pool[place]
            pool[place] = fakes[i]
    return shown


def byol(m, batches):
    online = nn.ModuleList([m.encoder, m.projector, m.predictor])
    optimizer = torch.optim.AdamW(online.parameters(), lr=2e-3, weight_decay=1e-4)
    for first, second in batches:
        views, other = torch.cat([first, second]), torch.cat([second, first])
        with torch.no_grad():
            wanted = m.target(other)
        loss = (2 - 2 * cosine_similarity(m.predictor(m.projector(m.encoder(views))), wanted)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        moving = [*m.encoder.parameters(), *m.projector.parameters()]
        for average, parameter in zip(m.target.parameters(), moving, strict=True):
            average.data = 0.99 * average.data + 0.01 * parameter.data


def maml(m, steps):
    optimizer = torch.optim.Adam(m.net.parameters(), lr=1e-3)
    for _ in range(steps):
        amplitude, phase = 0.1 + 4.9 * torch.rand(32, 1, 1), math.pi * torch.rand(32, 1, 1)
        x = 10 * torch.rand(32, 20, 1) - 5
        y, total = amplitude * torch.sin(x - phase), 0.0
        for task in range(32):
            weights = dict(m.net.named_parameters())
            inner = (functional_call(m.net, weights, x[task, :10]) - y[task, :10]).square().mean()
            slopes = torch.autograd.grad(inner, list(weights.values()), create_graph=True)
            fast = {name: w - 0.01 * slope for (name, w), slope in zip(weights.items(), slopes, strict=True)}
            total = total + (functional_call(m.net, fast, x[task, 10:]) - y[task, 10:]).square().mean()
        optimizer.zero_grad()
        (total / 32).backward()
        optimizer.step()


def pinn(m, batches, adam_steps):
    adam = torch.optim.Adam(m.net.parameters(), lr=3e-3)
    lbfgs = torch.optim.LBFGS(
        m.net.parameters(), max_iter=20, history_size=50, tolerance_change=0, line_search_fn="strong_wolfe"
    )
    for index, (inside, edge, values) in enumerate(batches):
        opt = adam if index < adam_steps else lbfgs

        def closure(opt=opt, inside=inside, edge=edge, values=values):
            x, t = (part.clone().requires_grad_() for part in inside.split(1, dim=1))
            u = m.net(torch.cat([x, t], dim=1))
            u_x, u_t = torch.autograd.grad(u.sum(), (x, t), create_graph=True)
            (u_xx,) = torch.autograd.grad(u_x.sum(), x, create_graph=True)
            loss = ((u_t - 0.2 * u_xx) ** 2).mean() + 10 * ((m.net(edge).flatten() - values) ** 2).mean()
            opt.zero_grad()
            loss.backward()
            return loss

        opt.step(closure)


def ppo(m, world, iterations):
    """Play and learn so many times; `m` has an actor and a critic, `world` the environments of the recipe."""
    horizon, passes, minibatch = m.task.horizon, m.task.passes, m.task.minibatch
    total = iterations * passes * (horizon * m.task.envs // minibatch)
    opts = [torch.optim.Adam(net.parameters(), lr=m.task.lr, eps=1e-5) for net in (m.actor, m.critic)]
    schedules = [LinearLR(opt, 1.0, 0.0, total_iters=total) for opt in opts]
    for _ in range(iterations):
        rows = []
        with torch.no_grad():
            for _ in range(horizon):
                seen = world.observations
                policy = m.actor(seen)
                actions = policy.sample()
                rows.append([seen, actions, policy.log_prob(actions), *world.step(actions)])
            seen, actions, before, rewards, ended, done, last = (
                torch.stack(column) for column in zip(*rows, strict=True)
            )
            values, following = m.critic(seen)[..., 0], m.critic(last)[..., 0] * (1 - ended.float())
            gains, running = m.task.scale * rewards + m.task.gamma * following - values, torch.zeros(done.shape[1])
            for k in range(horizon - 1, -1, -1):
                gains[k] = running = gains[k] + m.task.gamma * m.task.lam * (1 - done[k].float()) * running
        data = [column.flatten(0, 1) for column in (seen, actions, before, gains, gains + values)]
        for _ in range(passes):
            for chosen in torch.randperm(len(data[0])).split(minibatch):
                seen, actions, before, gain, returns = (column[chosen] for column in data)
                gain = (gain - gain.mean()) / (gain.std() + 1e-8)
                ratio = (m.actor(seen).log_prob(actions) - before).exp()
                losses = (
                    -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean(),
                    (m.critic(seen)[:, 0] - returns).square().mean(),
                )
                for opt, net, loss in zip(opts, (m.actor, m.critic), losses, strict=True):
                    opt.zero_grad()
                    loss.backward()
                    clip_grad_norm_(net.parameters(), 0.5)
                    opt.step()
                for schedule in schedules:
                    schedule.step()
