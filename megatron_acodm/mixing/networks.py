"""The agent's networks: an actor from states to mixtures, a critic from both to their value."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_acodm.mixing.simplex import Bounds, uniform_weights

FLOOR_MARGIN = 1.0 / 40.0
"""Least share of the way from its floor to uniform that a domain has under any prior."""

_ACTOR_HEAD_SCALE = 0.01
"""The actor's last layer starts this small, so that its first mixtures are the prior."""


class _MLP(nn.Sequential):
    """``layers`` times Linear, LayerNorm, ReLU; then a Linear head with scaled initial weights."""

    def __init__(
        self, inputs: int, hidden: int, layers: int, outputs: int, head_scale: float
    ) -> None:
        modules: list[nn.Module] = []
        for _ in range(layers):
            modules += [nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.ReLU()]
            inputs = hidden
        head = nn.Linear(inputs, outputs)
        with torch.no_grad():
            head.weight.mul_(head_scale)
            head.bias.zero_()
        super().__init__(*modules, head)

    def forward(self, inputs: Tensor) -> Tensor:
        """What the layers give one after the other.

        Their functions are called, not they: at this size a module's call costs as much as its
        arithmetic.
        """
        *layers, head = self
        for linear, norm in zip(layers[::3], layers[1::3], strict=True):
            inputs = functional.linear(inputs, linear.weight, linear.bias)
            shape = norm.normalized_shape
            inputs = functional.layer_norm(inputs, shape, norm.weight, norm.bias, norm.eps).relu_()
        return functional.linear(inputs, head.weight, head.bias)


class Actor(nn.Module):
    """States [..., S] to mixtures [..., K] within the bounds, from a prior that may move.

    weights = floor + (1 - sum floor) * softmax(log prior + net(state)): the floor holds by
    construction, with a gradient everywhere, and the critic is only ever asked about mixtures that
    can be drawn. Where a weight exceeds the ceiling, the mixture is pulled straight towards the
    uniform one until it no longer does, which keeps the floor.
    """

    log_prior: Tensor
    floor: Tensor
    uniform: Tensor

    def __init__(
        self, state_size: int, hidden_size: int, num_layers: int, prior: np.ndarray, bounds: Bounds
    ) -> None:
        """``prior`` [K] is the first mixture."""
        super().__init__()
        self.net = _MLP(state_size, hidden_size, num_layers, len(prior), _ACTOR_HEAD_SCALE)
        for name in ("log_prior", "floor", "uniform"):
            self.register_buffer(name, torch.empty(len(prior)), persistent=False)
        self._prior = prior
        self.restrict(bounds)

    def restrict(self, bounds: Bounds) -> None:
        """Choose within ``bounds`` from now on."""
        self.bounds = bounds
        self.spread = 1.0 - float(bounds.floor.sum())
        self.ceiling = float(bounds.ceiling.max())
        self.floor.copy_(torch.from_numpy(bounds.floor))
        self.uniform.copy_(torch.from_numpy(uniform_weights(bounds.active)))
        self.lean_on(self._prior)

    def lean_on(self, prior: np.ndarray) -> None:
        """Take another ``prior`` [K]: what the mixture is as long as the network says nothing.

        A softmax cannot leave its floor, so each domain keeps at least a fortieth of the way from
        there to uniform. A masked domain gets 0 whatever the network says.
        """
        self._prior = prior
        active, floor = self.bounds.active, self.bounds.floor
        least = np.maximum(FLOOR_MARGIN * (1.0 / active.sum() - floor), 1e-9)  # 0 where floor = 1/K
        log_share = np.log(np.maximum(prior - floor, least))
        self.log_prior.copy_(torch.from_numpy(np.where(active, log_share, -np.inf)))

    def forward(self, states: Tensor) -> Tensor:
        """Mixtures [..., K] for standardised ``states`` [..., S]."""
        share = torch.softmax(self.log_prior + self.net(states), dim=-1)
        weights = torch.add(self.floor, share, alpha=self.spread)
        return weights if self.ceiling >= 1.0 else self._pull_below_ceiling(weights)

    def distance_from_prior(self, weights: Tensor) -> Tensor:
        """KL(weights || prior) [...] in nats of ``weights`` [..., K] that this actor gave."""
        prior = self.floor + self.spread * torch.softmax(self.log_prior, dim=-1)
        tiny = torch.finfo(prior.dtype).tiny  # of a masked domain, which adds 0
        ratio = weights.clamp(min=tiny) / prior.clamp(min=tiny)
        return (weights * ratio.log()).sum(dim=-1)

    def _pull_below_ceiling(self, weights: Tensor) -> Tensor:
        room = self.ceiling - self.uniform.max()
        excess = (weights - self.uniform).amax(dim=-1, keepdim=True).clamp(min=1e-12)
        return torch.lerp(self.uniform, weights, (room / excess).clamp(max=1.0))


class Critic(nn.Module):
    """Q(s, a): standardised states [..., S] and mixtures [..., K] to the value of drawing them.

    Q(s, a) = sum_i a_i r_i(s, a) + f(s, a): the reward of this step, known domain by domain, and
    the discounted value of what follows. Together they satisfy the Bellman equation of the scalar
    reward; apart, the K measured rewards teach the critic more than their one sum (reward
    decomposition, van Seijen et al. 2017). It starts at 0, so that it does not send the actor
    anywhere before it has learned.
    """

    def __init__(
        self, state_size: int, hidden_size: int, num_layers: int, num_domains: int
    ) -> None:
        super().__init__()
        self.num_domains = num_domains
        self.net = _MLP(state_size + num_domains, hidden_size, num_layers, num_domains + 1, 0.0)

    def parts(self, states: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Each domain's reward [..., K], and the discounted value of what follows [...]."""
        action = weights * self.num_domains - 1.0  # 0 at uniform, of order 1
        output = self.net(torch.cat([states, action], dim=-1))
        rewards, future = output.split([self.num_domains, 1], dim=-1)
        return rewards, future.squeeze(-1)

    def forward(self, states: Tensor, weights: Tensor) -> Tensor:
        """Q [...]."""
        rewards, future = self.parts(states, weights)
        return (weights * rewards).sum(dim=-1) + future
