"""Run by `test_wheel.py` in an environment that has only the wheel: train a little, and show from where."""

import torch
import xtrain_backends

import xtrain


class Pair(xtrain.LightningModule):
    """Two networks, two optimizers, by hand."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.a, self.b = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        for network, optimizer in zip((self.a, self.b), self.optimizers(), strict=True):
            optimizer.zero_grad()
            self.manual_backward(network(batch).pow(2).mean())
            self.clip_gradients(optimizer, gradient_clip_val=1.0)
            assert optimizer.step() is True

    def configure_optimizers(self):
        return [torch.optim.SGD(network.parameters(), lr=0.1) for network in (self.a, self.b)]


if __name__ == "__main__":
    torch.manual_seed(0)
    module = Pair()
    before = [p.clone() for p in module.parameters()]
    trainer = xtrain.Trainer(backend="cpu", max_steps=3, enable_progress_bar=False)
    trainer.fit(module, [torch.randn(8, 4) for _ in range(3)])
    assert trainer.global_step == 3
    assert all(not torch.equal(p, q) for p, q in zip(before, module.parameters(), strict=True))
    print(xtrain.__file__, xtrain_backends.__file__)
    print("trained away from the sources")
