"""Proximal policy optimization (Schulman et al., 2017): an actor and a critic, each with its own optimizer.

    python examples/ppo.py
    python examples/ppo.py --task Pendulum-v1
    python examples/ppo.py --help

There is no loader: the module plays the environments, goes over what it saw in shuffled minibatches, one for each
training step, and plays again. It ends with a picture of the return, and with the mean of the last 100 episodes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from common import draw_curves, flags, start
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal
from torch.optim.lr_scheduler import LinearLR

from xtrain import LightningModule

try:
    import gymnasium
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; the examples need: pip install 'xtrain-torch[examples]'") from error


class Task(NamedTuple):
    """How an environment is learned; the values are those that are usual for it."""

    envs: int  # environments that are played side by side
    horizon: int  # steps of each of them before the networks are trained on what was seen
    passes: int  # how often the training goes over that
    minibatch: int  # rows of one training step
    gamma: float  # how much a reward counts a step earlier
    lam: float  # how far advantages trust returns rather than the critic
    lr: float  # at the start; it falls to 0 linearly
    steps: int  # training steps
    scale: float  # of rewards, so that returns are of the order of 1


TASKS = {
    "CartPole-v1": Task(8, 64, 10, 128, 0.98, 0.9, 2e-3, 8000, 0.1),
    "Pendulum-v1": Task(8, 256, 10, 256, 0.9, 0.95, 1e-3, 8000, 0.1),
}
CLIP = 0.2


def perceptron(inputs: int, outputs: int, gain: float) -> nn.Sequential:
    """Two hidden layers, orthogonal at the start; a small `gain` makes the first outputs small."""
    net = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))
    for layer, scale in zip(net[::2], (2**0.5, 2**0.5, gain), strict=True):
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.zeros_(layer.bias)
    return net


class Actor(nn.Module):
    """Observations ``(n, d)`` to a distribution over actions: a choice, or a normal one."""

    def __init__(self, observations: int, space: Any) -> None:
        super().__init__()
        self.discrete = isinstance(space, gymnasium.spaces.Discrete)
        self.net = perceptron(observations, int(space.n) if self.discrete else space.shape[0], 0.01)
        self.log_std = None if self.discrete else nn.Parameter(torch.zeros(space.shape))

    def forward(self, observations: Tensor) -> Any:
        out = self.net(observations).float()
        if self.log_std is None:
            return Categorical(logits=out, validate_args=False)
        return Independent(Normal(out, self.log_std.float().exp(), validate_args=False), 1, validate_args=False)


class World:
    """Several environments that are played side by side, and the returns of the episodes that ended."""

    def __init__(self, name: str, count: int, seed: int) -> None:
        mode = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
        self.envs = gymnasium.make_vec(name, num_envs=count, vectorization_mode="sync", vector_kwargs=mode)
        self.observations = self._tensor(self.envs.reset(seed=seed)[0])
        self.running, self.returns, self.steps = torch.zeros(count), list[tuple[int, float]](), 0

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return rewards, what ended by itself, what ended at all, ``(n,)``, and the last observations ``(n, d)``."""
        now, rewards, ended, limited, info = self.envs.step(actions.numpy())
        self.observations, last, done = self._tensor(now), self._tensor(now), torch.from_numpy(ended | limited)
        for i in done.nonzero().flatten().tolist():  # there `now` is the start of the next episode
            last[i] = self._tensor(info["final_obs"][i])
        self.running, self.steps = self.running + self._tensor(rewards), self.steps + len(rewards)
        self.returns += [(self.steps, value) for value in self.running[done].tolist()]
        self.running[done] = 0.0
        return self._tensor(rewards), torch.from_numpy(ended), done, last

    @staticmethod
    def _tensor(values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.float32).clone()

    def mean_return(self) -> float:
        """Return the mean of the last 100 episodes."""
        last = [value for _, value in self.returns[-100:]]
        return sum(last) / max(1, len(last))


class PPO(LightningModule):
    """Algorithm 1 of the paper, on a task of `TASKS`."""

    def __init__(self, name: str, seed: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.task, self.name, self.seed = TASKS[name], name, seed
        example = gymnasium.make(name)
        self.actor = Actor(example.observation_space.shape[0], example.action_space)
        self.critic = perceptron(example.observation_space.shape[0], 1, 1.0)
        self.minibatches: list[Tensor] = []

    def configure_optimizers(self) -> Any:
        adams = [torch.optim.Adam(net.parameters(), lr=self.task.lr, eps=1e-5) for net in (self.actor, self.critic)]
        return adams, [LinearLR(adam, 1.0, 0.0, self.trainer.estimated_stepping_batches) for adam in adams]

    def on_fit_start(self) -> None:
        self.world = World(self.name, self.task.envs, self.seed + 1000 * self.global_rank)

    @torch.no_grad()
    def play(self) -> list[Tensor]:
        """Play `horizon` steps; return observations, actions, log probabilities, advantages and returns, by row."""
        task, world, seen = self.task, self.world, []
        for _ in range(task.horizon):
            observations = world.observations.to(self.device)
            policy = self.actor(observations)
            actions = policy.sample()
            result = world.step(self.trainer.backend.to_cpu(actions))
            seen.append((observations, actions, policy.log_prob(actions), *result))
        seen = [torch.stack(values).to(self.device) for values in zip(*seen, strict=True)]
        observations, actions, log_probs, (rewards, ended, done, last) = *seen[:3], (x.float() for x in seen[3:])
        values, next_values = (self.critic(x).float()[..., 0] for x in (observations, last))
        errors = task.scale * rewards + task.gamma * next_values * (1 - ended) - values
        advantage, running = torch.zeros_like(errors), torch.zeros_like(errors[0])
        for k in reversed(range(task.horizon)):
            advantage[k] = running = errors[k] + task.gamma * task.lam * (1 - done[k]) * running
        return [x.flatten(0, 1) for x in (observations, actions, log_probs, advantage, advantage + values)]

    # --8<-- [start:step]
    def training_step(self, batch: None, batch_idx: int) -> None:
        if not self.minibatches:
            self.rollout = self.play()
            for _ in range(self.task.passes):
                self.minibatches += torch.randperm(len(self.rollout[0])).split(self.task.minibatch)
        rows = self.minibatches.pop(0).to(self.device)
        observations, actions, before, advantage, returns = (values[rows] for values in self.rollout)
        opt_actor, opt_critic = self.optimizers()

        advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
        ratio = (self.actor(observations).log_prob(actions) - before).exp()
        gain = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
        opt_actor.zero_grad()
        self.manual_backward(-gain)
        self.clip_gradients(opt_actor, gradient_clip_val=0.5)
        opt_actor.step()

        loss = (self.critic(observations).float()[:, 0] - returns).square().mean()
        opt_critic.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(opt_critic, gradient_clip_val=0.5)
        opt_critic.step()

        for scheduler in self.lr_schedulers():
            scheduler.step()
        self.log_dict({"return": self.world.mean_return(), "critic": loss}, prog_bar=True)

    # --8<-- [end:step]


def smooth(returns: list[tuple[int, float]], window: int = 20) -> tuple[list[int], list[float]]:
    """Return steps, and the mean over the last `window` episodes at each of them."""
    values = torch.tensor([0.0, *(value for _, value in returns)]).cumsum(0)
    means = [(values[i] - values[max(0, i - window)]).item() / min(i, window) for i in range(1, len(values))]
    return [step for step, _ in returns], means


def main() -> None:
    parser = flags("Learn to act by proximal policy optimization.", steps=0)
    parser.add_argument("--task", choices=TASKS, default="CartPole-v1")
    options = parser.parse_args()
    trainer = start(options)
    module = PPO(options.task, options.seed)
    trainer.fit(module, steps=options.steps or module.task.steps)

    if trainer.is_global_zero:
        options.out.mkdir(parents=True, exist_ok=True)
        world, picture = module.world, options.out / f"ppo-{options.task}.png"
        steps, means = smooth(world.returns)
        axis = {"xlabel": "steps of the environments", "ylabel": "return", "title": f"PPO on {options.task}"}
        draw_curves({"mean of 20 episodes": means}, picture, x=steps, **axis)
        print(f"mean return of the last 100 of {len(world.returns)} episodes: {world.mean_return():.1f}")
        print(f"Picture: {picture}")


if __name__ == "__main__":
    main()
