"""DDPG (Lillicrap et al. 2016) over mixtures, as the paper's section 3 uses it."""

from __future__ import annotations

import copy
import math
from typing import Any, Generic, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from megatron_acodm.config import AgentConfig
from megatron_acodm.mixing.networks import Actor, Critic
from megatron_acodm.mixing.replay import Transitions
from megatron_acodm.mixing.reward import REWARD_CLIP
from megatron_acodm.mixing.simplex import Bounds

Network = TypeVar("Network", bound=nn.Module)


class Learner(Generic[Network]):
    """A network, the moments with which Adam trains it, and the target network that follows it."""

    def __init__(self, network: Network, lr: float) -> None:
        self.network = network.requires_grad_(False)
        self.target = copy.deepcopy(network)
        self.lr = lr
        self._parameters: list[Tensor] = list(network.parameters())
        self._target_parameters: list[Tensor] = list(self.target.parameters())
        self._moments = {
            "step": [torch.zeros(()) for _ in self._parameters],
            "exp_avg": [torch.zeros_like(parameter) for parameter in self._parameters],
            "exp_avg_sq": [torch.zeros_like(parameter) for parameter in self._parameters],
        }

    def descend(self, gradients: list[Tensor]) -> None:
        """One step of Adam along the ``gradients`` of the network's parameters.

        Raises:
            FloatingPointError: if they are not finite. What is learned from is finite, so the
                network has run away: it is put back to its target.
        """
        # Adam keeps squares: one beyond float32 would hold its parameter still for ever.
        squares = torch.stack(torch._foreach_norm(gradients)).square().sum().item()
        if not math.isfinite(squares):
            self.restart_from_target(f"the squared norm of its gradient is {squares:.4g}")
        averages, square_averages = self._moments["exp_avg"], self._moments["exp_avg_sq"]
        steps = self._moments["step"]
        torch._foreach_add_(steps, 1.0)
        torch._fused_adam_(  # what torch.optim.Adam(fused=True) calls
            self._parameters, gradients, averages, square_averages, [], steps, lr=self.lr,
            beta1=0.9, beta2=0.999, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip

    def restart_from_target(self, reason: str) -> NoReturn:
        """Put a network that has run away back to its target; always raises FloatingPointError."""
        torch._foreach_copy_(self._parameters, self._target_parameters)
        for moments in self._moments.values():
            torch._foreach_zero_(moments)
        raise FloatingPointError(
            f"the {type(self.network).__name__} has run away and is put back to its target "
            f"network: {reason}"
        )

    def follow(self, tau: float) -> None:
        """Move the target network by the share ``tau`` towards the trained one."""
        torch._foreach_lerp_(self._target_parameters, self._parameters, tau)

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to continue bit for bit."""
        return {
            "network": _clone(self.network.state_dict()),
            "target": _clone(self.target.state_dict()),
            "optimizer": {
                name: _clone({key: moments[place] for key, moments in self._moments.items()})
                for place, (name, _) in enumerate(self.network.named_parameters())
            },
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``.

        Raises:
            ValueError: if the saved network has another shape.
        """
        try:
            self.network.load_state_dict(state["network"])
            self.target.load_state_dict(state["target"])
        except RuntimeError as error:
            raise ValueError(
                "the saved network has another shape; keep agent.hidden_size, agent.num_layers, "
                f"the domains and alignment.num_probes of the saved run ({error})"
            ) from error
        for place, (name, _) in enumerate(self.network.named_parameters()):
            for key, moments in self._moments.items():
                moments[place].copy_(state["optimizer"][name][key])


class Losses(NamedTuple):
    """What one update measured."""

    critic_loss: float
    """Squared error of the domains' rewards plus that of the value of what follows."""

    value: float
    """Mean Q of the actor's mixtures, which the actor ascends."""


class DDPGAgent:
    """An actor that ascends the value that a critic learns from replayed transitions.

    It ascends Q - lambda KL(mixture || prior): the more a mixture departs from the prior, the more
    there must be to gain. Along the mixture's weights a_i that is dQ/da_i - lambda log(a_i /
    prior_i), up to a constant, which moves no weight because they sum to 1.
    """

    def __init__(
        self, config: AgentConfig, state_size: int, prior: np.ndarray, bounds: Bounds, seed: int
    ) -> None:
        """``prior`` [K] is the mixture that the actor starts from."""
        self.config = config
        shape = (state_size, config.hidden_size, config.num_layers)
        with torch.random.fork_rng(devices=[]):  # the host's random numbers must not notice
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
            self.actor = Learner(Actor(*shape, prior, bounds), config.actor_lr)
            self.critic = Learner(Critic(*shape, len(prior)), config.critic_lr)
        gamma = config.gamma
        # What clipped rewards can add up to.
        self._largest_future = gamma * REWARD_CLIP / (1.0 - gamma) if gamma < 1.0 else math.inf

    def act(self, state: Tensor) -> np.ndarray:
        """The actor's mixture [K] float64 for a standardised ``state`` [S]."""
        return self.actor.network(state).double().numpy()

    def lean_on(self, prior: np.ndarray) -> None:
        """Judge and choose from another ``prior`` [K], also in what was replayed."""
        self.actor.network.lean_on(prior)
        self.actor.target.lean_on(prior)

    def restrict(self, bounds: Bounds) -> None:
        """Let the actor choose within other bounds from now on."""
        self.actor.network.restrict(bounds)
        self.actor.target.restrict(bounds)

    def update(self, batch: Transitions) -> Losses:
        """One step of the critic, one of the actor; the targets follow. All standardised.

        Raises:
            FloatingPointError: if a network has run away, before its target or the other follow.
        """
        actor, critic = self.actor.network, self.critic.network
        future = self.future_target(batch)
        losses, gradients = critic.loss(batch.states, batch.weights, batch.rewards, future)
        self._check_range(losses, batch, future)
        self.critic.descend(gradients)
        self.critic.follow(self.config.tau)
        mixtures, trace = actor.trace(batch.states)
        value, slope = critic.slope(batch.states, mixtures)
        pull = self.config.prior_strength * actor.log_ratio(mixtures)
        self.actor.descend(actor.gradients(trace, (pull - slope) / len(slope)))
        self.actor.follow(self.config.tau)
        return Losses(sum(losses), value.mean().item())

    def _check_range(self, losses: tuple[float, float], batch: Transitions, future: Tensor) -> None:
        """Put back a critic that is further off than any value within its range could be."""
        most = (REWARD_CLIP, max(REWARD_CLIP, self._largest_future))
        largest = tuple(4.0 * value**2 for value in most)

        def is_within(losses: tuple[float, float]) -> bool:
            return all(loss <= limit for loss, limit in zip(losses, largest, strict=True))

        if is_within(losses):
            return
        target = self.critic.target
        if not is_within(target.loss(batch.states, batch.weights, batch.rewards, future)[0]):
            target.forget()
        self.critic.restart_from_target(
            "its losses of rewards and of what follows are {:.4g} and {:.4g}, where values within "
            "range give {:.4g} and {:.4g} at most".format(*losses, *largest)
        )

    def future_target(self, batch: Transitions) -> Tensor:
        """What follows, gamma Q'(s', mu'(s')) [B]; with the rewards, Q regresses r + this.

        Bounded by what clipped rewards can add up to, so that a critic cannot run away.
        """
        next_values = self.critic.target(batch.next_states, self.actor.target(batch.next_states))
        limit = self._largest_future
        return (self.config.gamma * next_values).clamp_(-limit, limit)

    def state_dict(self) -> dict[str, Any]:
        """Everything that ``load_state_dict`` needs to continue bit for bit."""
        return {"actor": self.actor.state_dict(), "critic": self.critic.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict``; raises ValueError if the networks do not fit."""
        self.actor.load_state_dict(state["actor"])
        self.critic.load_state_dict(state["critic"])


def _clone(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}
