"""The agent's networks: an actor from states to mixtures, a critic from both to their value.

Their gradients are written out. At this size autograd's bookkeeping takes as long as the arithmetic
(docs/benchmarks.md), and the thread that decides holds Python's lock meanwhile.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_acodm.mixing.simplex import Bounds, uniform_weights

FLOOR_MARGIN = 1.0 / 40.0
"""Least share of the way from its floor to uniform that a domain has under any prior."""

_ACTOR_HEAD_SCALE = 0.01
"""The actor's last layer starts this small, so that its first mixtures are the prior."""


_relu_backward = torch.ops.aten.threshold_backward.default
_layer_norm_backward = torch.ops.aten.native_layer_norm_backward.default


class _HiddenLayer(NamedTuple):
    """What a hidden layer's backward pass needs of its forward one, for N rows."""

    inputs: Tensor
    linear: Tensor
    """[N, H]: before the norm."""

    mean: Tensor
    inverse_spread: Tensor
    output: Tensor
    """[N, H]: after the ReLU."""


class MLP(nn.Sequential):
    """``layers`` times Linear, LayerNorm, ReLU; then a Linear head with scaled initial weights."""

    def __init__(
        self, inputs: int, hidden: int, layers: int, outputs: int, head_scale: float
    ) -> None:
        pairs = []
        for _ in range(layers):
            pairs.append((nn.Linear(inputs, hidden), nn.LayerNorm(hidden)))
            inputs = hidden
        head = nn.Linear(inputs, outputs)
        with torch.no_grad():
            head.weight.mul_(head_scale)
            head.bias.zero_()
        super().__init__(*(module for pair in pairs for module in (*pair, nn.ReLU())), head)
        self._layers = (pairs, head)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs [..., O] for ``inputs`` [..., I]."""
        return self.trace(inputs)[0]

    def silence(self) -> None:
        """Answer 0 to everything."""
        head = self._layers[1]
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)

    def trace(self, inputs: Tensor) -> tuple[Tensor, list[_HiddenLayer]]:
        """Outputs [..., O] for ``inputs`` [..., I], and what the gradients below need of them."""
        pairs, head = self._layers
        hidden = []
        for layer, norm in pairs:
            linear = functional.linear(inputs, layer.weight, layer.bias)
            output, mean, inverse_spread = torch.native_layer_norm(
                linear, norm.normalized_shape, norm.weight, norm.bias, norm.eps
            )
            hidden.append(_HiddenLayer(inputs, linear, mean, inverse_spread, output.relu_()))
            inputs = output
        return functional.linear(inputs, head.weight, head.bias), hidden

    def parameter_gradients(self, hidden: list[_HiddenLayer], gradient: Tensor) -> list[Tensor]:
        """Of a loss whose ``gradient`` by the outputs is [N, O]; in the order of ``parameters``."""
        return self._backward(hidden, gradient, learns=True)[::-1]

    def input_gradient(self, hidden: list[_HiddenLayer], gradient: Tensor) -> Tensor:
        """[N, I] of a loss whose ``gradient`` by the outputs is [N, O]."""
        return self._backward(hidden, gradient, learns=False)[0]

    def _backward(self, hidden: list[_HiddenLayer], gradient: Tensor, learns: bool) -> list[Tensor]:
        """From the last layer to the first: their parameters' gradients, or else the inputs'."""
        pairs, head = self._layers
        found = []
        if learns:
            found += [gradient.sum(dim=0), gradient.t().mm(hidden[-1].output)]
        gradient = gradient.mm(head.weight)
        for place in reversed(range(len(pairs))):
            (layer, norm), kept = pairs[place], hidden[place]
            gradient = _relu_backward(gradient, kept.output, 0)
            gradient, by_scale, by_shift = _layer_norm_backward(
                gradient, kept.linear, norm.normalized_shape, kept.mean, kept.inverse_spread,
                norm.weight, norm.bias, (True, learns, learns),
            )  # fmt: skip
            if learns:
                found += [by_shift, by_scale, gradient.sum(dim=0), gradient.t().mm(kept.inputs)]
            if place > 0 or not learns:
                gradient = gradient.mm(layer.weight)
        return found or [gradient]


class ActorTrace(NamedTuple):
    """What the actor's gradients need of how N mixtures came about."""

    share: Tensor
    """[N, K]: the softmax."""

    weights: Tensor
    """[N, K]: within the floor, before the pull below the ceiling."""

    pull: Tensor | None
    """[N, 1]: the share of the way from uniform that is left of them; None where all of it is."""

    hidden: list[_HiddenLayer]


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
        self.net = MLP(state_size, hidden_size, num_layers, len(prior), _ACTOR_HEAD_SCALE)
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
        uniform = uniform_weights(bounds.active)
        self.uniform.copy_(torch.from_numpy(uniform))
        # Not 0, also where the floor is 1/K.
        self._least = np.maximum(FLOOR_MARGIN * (uniform - bounds.floor), 1e-9)
        self._masked = np.where(bounds.active, 0.0, -np.inf)
        self.lean_on(self._prior)

    def lean_on(self, prior: np.ndarray) -> None:
        """Take another ``prior`` [K]: what the mixture is as long as the network says nothing.

        A softmax cannot leave its floor, so each domain keeps at least a fortieth of the way from
        there to uniform. A masked domain gets 0 whatever the network says.
        """
        self._prior = prior
        log_share = np.log(np.maximum(prior - self.bounds.floor, self._least))
        self.log_prior.copy_(torch.from_numpy(log_share + self._masked))

    def forward(self, states: Tensor) -> Tensor:
        """Mixtures [..., K] for standardised ``states`` [..., S]."""
        return self.trace(states)[0]

    def trace(self, states: Tensor) -> tuple[Tensor, ActorTrace]:
        """Mixtures [..., K] for ``states`` [..., S], and what ``gradients`` needs of them."""
        logits, hidden = self.net.trace(states)
        share = torch.softmax(self.log_prior + logits, dim=-1)
        weights = torch.add(self.floor, share, alpha=self.spread)
        if self.ceiling >= 1.0:
            return weights, ActorTrace(share, weights, None, hidden)
        room = self.ceiling - self.uniform.max()
        pull = (room / self._excess(weights)).clamp(max=1.0)
        pulled = torch.lerp(self.uniform, weights, pull)
        return pulled, ActorTrace(share, weights, pull, hidden)

    def gradients(self, trace: ActorTrace, gradient: Tensor) -> list[Tensor]:
        """Of each parameter, for a loss whose ``gradient`` by the mixtures is [N, K]."""
        if trace.pull is not None:
            gradient = self._before_the_pull(trace.weights, trace.pull, gradient)
        mean = (trace.share * gradient).sum(dim=-1, keepdim=True)
        by_logits = self.spread * trace.share * (gradient - mean)
        return self.net.parameter_gradients(trace.hidden, by_logits)

    def log_ratio(self, weights: Tensor) -> Tensor:
        """log(weights / prior) [..., K]; finite also for a masked domain, whose weight is 0."""
        prior = self.floor + self.spread * torch.softmax(self.log_prior, dim=-1)
        tiny = torch.finfo(prior.dtype).tiny
        return (weights.clamp(min=tiny) / prior.clamp(min=tiny)).log()

    def _excess(self, weights: Tensor) -> Tensor:
        """By how much the largest of ``weights`` [..., K] is above uniform, [..., 1]."""
        return (weights - self.uniform).amax(dim=-1, keepdim=True).clamp(min=1e-12)

    def _before_the_pull(self, weights: Tensor, pull: Tensor, gradient: Tensor) -> Tensor:
        """A gradient [N, K] by mixtures below the ceiling, turned into one by ``weights``.

        u + p (w - u) with p = room / (w_m - u_m) at the largest m: where p < 1, w_m also sets p.
        """
        off = weights - self.uniform
        along = (gradient * off).sum(dim=-1, keepdim=True)
        by_largest = torch.where(pull < 1.0, -pull * along / self._excess(weights), 0.0)
        return (pull * gradient).scatter_add(-1, off.argmax(dim=-1, keepdim=True), by_largest)


class Critic(nn.Module):
    """Q(s, a): standardised states [..., S] and mixtures [..., K] to the value of drawing them.

    Q(s, a) = sum_i a_i r_i(s, a) + f(s, a): the reward of this step, known domain by domain, and
    the discounted value of what follows. Together they satisfy the Bellman equation of the scalar
    reward; apart, the K measured rewards teach the critic more than their one sum (reward
    decomposition, van Seijen et al. 2017). It starts at 0, so that it does not send the actor
    anywhere before it has learned.
    """

    _shares: Tensor

    def __init__(
        self, state_size: int, hidden_size: int, num_layers: int, num_domains: int
    ) -> None:
        super().__init__()
        self.num_domains = num_domains
        shares = torch.full([num_domains + 1], 1.0 / num_domains)
        shares[-1] = 1.0
        self.register_buffer("_shares", shares, persistent=False)  # of errors in the loss
        self.net = MLP(state_size + num_domains, hidden_size, num_layers, num_domains + 1, 0.0)

    def forward(self, states: Tensor, weights: Tensor) -> Tensor:
        """Q [...]."""
        return self._value(weights, self.net(self._inputs(states, weights)))

    def loss(
        self, states: Tensor, weights: Tensor, rewards: Tensor, future: Tensor
    ) -> tuple[tuple[float, float], list[Tensor]]:
        """How far it is from ``rewards`` [N, K] and from what follows, ``future`` [N].

        Returns:
            The mean squared errors over all rewards and over what follows, and their sum's
            gradients.
        """
        output, hidden = self.net.trace(self._inputs(states, weights))
        error = output - torch.cat([rewards, future.unsqueeze(-1)], dim=-1)
        *of_rewards, of_future = error.square().mean(dim=0).tolist()
        gradient = error * (2.0 / len(error) * self._shares)
        losses = (sum(of_rewards) / self.num_domains, of_future)
        return losses, self.net.parameter_gradients(hidden, gradient)

    def forget(self) -> None:
        """Value everything at 0, as in the beginning."""
        self.net.silence()

    def slope(self, states: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Q [N], and its gradient by the ``weights``, [N, K]."""
        output, hidden = self.net.trace(self._inputs(states, weights))
        by_output = torch.cat([weights, torch.ones_like(weights[:, :1])], dim=-1)
        by_input = self.net.input_gradient(hidden, by_output)
        slope = by_input[:, states.shape[-1] :] * self.num_domains + output[:, :-1]
        return self._value(weights, output), slope

    def _inputs(self, states: Tensor, weights: Tensor) -> Tensor:
        action = weights * self.num_domains - 1.0  # 0 at uniform, of order 1
        return torch.cat([states, action], dim=-1)

    def _value(self, weights: Tensor, output: Tensor) -> Tensor:
        return (weights * output[..., :-1]).sum(dim=-1) + output[..., -1]
