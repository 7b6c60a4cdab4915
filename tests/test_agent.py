"""The DDPG update, against its formulas in float64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from megatron_acodm.config import AgentConfig
from megatron_acodm.mixing.agent import DDPGAgent
from megatron_acodm.mixing.replay import ReplayBuffer, Transitions
from megatron_acodm.mixing.simplex import Bounds

DOMAINS, STATE = 3, 5
PRIOR = np.array([0.5, 0.3, 0.2])
CONFIG = AgentConfig(hidden_size=8, num_layers=2, gamma=0.9, tau=0.25, prior_strength=0.7)
BOUNDS = Bounds.build(np.ones(DOMAINS, bool), 0.05, 1.0)


@pytest.fixture
def agent() -> DDPGAgent:
    agent = DDPGAgent(CONFIG, STATE, PRIOR, BOUNDS, seed=1)
    batch = _batch(seed=9)
    for _ in range(5):  # away from the initial zeros
        agent.update(batch)
    return agent


def _batch(seed: int, size: int = 6) -> Transitions:
    generator = torch.Generator().manual_seed(seed)
    states, next_states = torch.randn(2, size, STATE, generator=generator)
    weights = torch.softmax(torch.randn(size, DOMAINS, generator=generator), dim=-1)
    return Transitions(
        states, weights, torch.randn(size, DOMAINS, generator=generator), next_states
    )


def _double(network: Any) -> Any:
    """A copy in float64 that autograd follows."""
    return copy.deepcopy(network).double().requires_grad_()


def _forward_by_hand(net: torch.nn.Sequential, x: np.ndarray) -> np.ndarray:
    """Linear, LayerNorm, ReLU, ..., Linear in float64."""
    for module in net:
        if isinstance(module, torch.nn.ReLU):
            x = np.maximum(x, 0)
            continue
        weight, bias = (p.detach().double().numpy() for p in module.parameters())
        if isinstance(module, torch.nn.LayerNorm):
            x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + module.eps)
            x = x * weight + bias
        else:
            x = x @ weight.T + bias
    return x


def test_a_fresh_actor_is_at_the_prior_and_a_fresh_critic_at_zero() -> None:
    agent = DDPGAgent(CONFIG, STATE, PRIOR, BOUNDS, seed=1)
    batch = _batch(seed=2)
    np.testing.assert_allclose(agent.act(batch.states[0]), PRIOR, atol=0.01)
    assert agent.critic.network(batch.states, batch.weights).abs().max() == 0


def test_the_critic_is_the_weighted_rewards_plus_what_follows(agent: DDPGAgent) -> None:
    batch = _batch(seed=2)
    critic = agent.critic.network
    states, weights = batch.states.double().numpy(), batch.weights.double().numpy()
    x = np.concatenate([states, weights * DOMAINS - 1], axis=1)
    output = _forward_by_hand(critic.net, x)
    expected = (weights * output[:, :DOMAINS]).sum(axis=1) + output[:, DOMAINS]
    actual = critic(batch.states, batch.weights)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(critic.slope(batch.states, batch.weights)[0], actual)


def test_what_follows_is_worth_gamma_q_of_the_targets(agent: DDPGAgent) -> None:
    batch = _batch(seed=2)
    states = batch.next_states.double().numpy()
    logits = agent.actor.target.log_prior.numpy() + _forward_by_hand(agent.actor.target.net, states)
    share = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    weights = 0.05 + (1 - 3 * 0.05) * share  # floor 0.05
    x = np.concatenate([states, weights * DOMAINS - 1], axis=1)
    output = _forward_by_hand(agent.critic.target.net, x)
    value = (weights * output[:, :DOMAINS]).sum(axis=1) + output[:, DOMAINS]
    np.testing.assert_allclose(
        agent.future_target(batch), CONFIG.gamma * value, rtol=1e-4, atol=1e-5
    )


def test_what_follows_cannot_exceed_what_clipped_rewards_add_up_to(agent: DDPGAgent) -> None:
    with torch.no_grad():
        agent.critic.target.net[-1].bias.fill_(1e6)
    limit = 5 * CONFIG.gamma / (1 - CONFIG.gamma)  # 5 in the next step, discounted, and so on
    torch.testing.assert_close(agent.future_target(_batch(seed=2)), torch.full((6,), limit))


@pytest.mark.parametrize("ceiling", [1.0, 0.44])
def test_each_network_descends_along_its_own_gradient(
    agent: DDPGAgent, ceiling: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, taken = _batch(seed=3, size=40), {}
    agent.restrict(Bounds.build(np.ones(DOMAINS, bool), 0.05, ceiling))
    agent.actor.network.net[-1].weight.mul_(100.0)  # away from the prior
    target = agent.future_target(batch).double()
    critic, actor = _double(agent.critic.network), _double(agent.actor.network)
    states, weights = batch.states.double(), batch.weights.double()
    output = critic.net(torch.cat([states, weights * DOMAINS - 1], dim=-1))
    errors = output - torch.cat([batch.rewards, target[:, None]], dim=-1)
    loss = errors[:, :DOMAINS].square().mean() + errors[:, DOMAINS].square().mean()
    critic_gradients = torch.autograd.grad(loss, list(critic.parameters()))
    for name, learner in (("critic", agent.critic), ("actor", agent.actor)):
        descend = learner.descend

        def recorded(gradients: list[Any], name: str = name, descend: Any = descend) -> None:
            taken[name] = [gradient.double() for gradient in gradients]
            descend(gradients)

        monkeypatch.setattr(learner, "descend", recorded)

    losses = agent.update(batch)
    assert losses.critic_loss == pytest.approx(loss.item(), rel=1e-4)
    torch.testing.assert_close(taken["critic"], [*critic_gradients], rtol=1e-3, atol=1e-6)
    # The actor ascends the value that the critic, after its own step, gives to its mixtures.
    mixtures = actor(states)
    assert (mixtures.amax(dim=-1) > 0.999 * ceiling).any() == (ceiling < 1.0)
    assert (mixtures.amax(dim=-1) < 0.99 * ceiling).any()
    value = _double(agent.critic.network)(states, mixtures).mean()
    distance = (mixtures * (mixtures.log() - torch.from_numpy(PRIOR).log())).sum(-1).mean()
    assert distance > 0.01
    assert losses.value == pytest.approx(value.item(), rel=1e-3, abs=1e-5)
    loss = CONFIG.prior_strength * distance - value
    actor_gradients = torch.autograd.grad(loss, list(actor.parameters()))
    torch.testing.assert_close(taken["actor"], [*actor_gradients], rtol=1e-3, atol=1e-6)


def test_the_gradients_of_the_networks_are_autograds(agent: DDPGAgent) -> None:
    net = _double(agent.critic.network).net
    inputs = torch.randn(7, STATE + DOMAINS, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(7, DOMAINS + 1, dtype=torch.float64)
    parameters = list(net.parameters())
    expected = torch.autograd.grad(net(inputs), [inputs, *parameters], direction)
    with torch.no_grad():
        _, hidden = net.trace(inputs)
        found = [net.input_gradient(hidden, direction), *net.parameter_gradients(hidden, direction)]
    torch.testing.assert_close(found, [*expected], rtol=1e-12, atol=1e-12)


def test_no_step_is_taken_along_a_gradient_that_is_not_finite(agent: DDPGAgent) -> None:
    learner = agent.critic
    gradients = [torch.zeros_like(parameter) for parameter in learner.network.parameters()]
    gradients[0][0, 0] = 1e30  # its square is beyond float32
    with pytest.raises(FloatingPointError, match="Critic has run away.*is inf"):
        learner.descend(gradients)
    pairs = zip(learner.network.parameters(), learner.target.parameters(), strict=True)
    assert all(torch.equal(online, target) for online, target in pairs)
    for moments in learner.state_dict()["optimizer"].values():
        assert all(moment.abs().max() == 0.0 for moment in moments.values())


def test_both_networks_change_and_their_targets_follow_by_tau(agent: DDPGAgent) -> None:
    before = {
        name: [parameter.clone() for parameter in learner.network.parameters()]
        for name, learner in (("actor", agent.actor), ("critic", agent.critic))
    }
    targets = {
        name: [parameter.clone() for parameter in learner.target.parameters()]
        for name, learner in (("actor", agent.actor), ("critic", agent.critic))
    }
    agent.update(_batch(seed=4))
    for name, learner in (("actor", agent.actor), ("critic", agent.critic)):
        pairs = zip(before[name], learner.network.parameters(), strict=True)
        assert any(not torch.equal(old, new) for old, new in pairs)
        rows = zip(
            targets[name], learner.network.parameters(), learner.target.parameters(), strict=True
        )
        for old, online, followed in rows:
            expected = old + CONFIG.tau * (online - old)
            torch.testing.assert_close(followed, expected)


def test_a_masked_domain_leaves_the_distance_from_the_prior_finite(agent: DDPGAgent) -> None:
    agent.restrict(Bounds.build(np.array([True, False, True]), 0.05, 1.0))
    actor, states = agent.actor.network, _batch(seed=2).states
    mixtures = actor(states)
    prior = torch.tensor([0.45, 0.0, 0.15]) / 0.6 * 0.9 + torch.tensor([0.05, 0.0, 0.05])
    kept = [0, 2]
    expected = (mixtures[:, kept] / prior[kept]).log()
    log_ratio = actor.log_ratio(mixtures)
    torch.testing.assert_close(log_ratio[:, kept], expected, rtol=1e-4, atol=1e-6)
    assert log_ratio.isfinite().all()
    assert all(losses == losses for losses in agent.update(_batch(seed=5)))  # no nan


def test_the_actor_respects_floor_and_ceiling() -> None:
    bounds = Bounds.build(np.ones(DOMAINS, bool), 0.1, 0.5)
    agent = DDPGAgent(CONFIG, STATE, np.array([0.4, 0.35, 0.25]), bounds, seed=1)
    with torch.no_grad():
        agent.actor.network.net[-1].bias.copy_(torch.tensor([9.0, 0.0, -9.0]))
    for state in 10 * _batch(seed=2).states:
        assert bounds.contains(agent.act(state), tolerance=1e-6)


def test_where_the_floor_leaves_no_choice_the_mixture_is_the_floor() -> None:
    bounds = Bounds.build(np.ones(DOMAINS, bool), 1 / DOMAINS, 1.0)
    agent = DDPGAgent(CONFIG, STATE, np.full(DOMAINS, 1 / DOMAINS), bounds, seed=1)
    agent.lean_on(np.array([0.8, 0.1, 0.1]))
    assert agent.act(torch.randn(STATE)) == pytest.approx(np.full(DOMAINS, 1 / DOMAINS))


def test_another_prior_is_the_mixture_of_a_fresh_actor() -> None:
    agent = DDPGAgent(CONFIG, STATE, PRIOR, BOUNDS, seed=1)
    agent.lean_on(np.array([0.2, 0.7, 0.1]))
    assert agent.act(torch.zeros(STATE)) == pytest.approx(np.array([0.2, 0.7, 0.1]), abs=0.02)
    log_ratio = agent.actor.network.log_ratio(torch.tensor([0.2, 0.7, 0.1]))
    torch.testing.assert_close(log_ratio, torch.zeros(DOMAINS), rtol=0.0, atol=1e-6)


def test_the_replay_forgets_the_oldest_and_continues_exactly() -> None:
    replay = ReplayBuffer(4, STATE, DOMAINS, recency=3.0, seed=1)

    def add(buffer: ReplayBuffer, value: float) -> None:
        state = torch.full((STATE,), value)
        weights = torch.full((DOMAINS,), value, dtype=torch.float64)
        buffer.add(state, weights, torch.full((DOMAINS,), value), state + 0.5)

    for value in range(6):
        add(replay, float(value))
    assert replay.size == 4
    seen = {row[0].item() for _ in range(20) for row in replay.sample(4).states}
    assert seen == {2.0, 3.0, 4.0, 5.0}
    restored = ReplayBuffer(4, STATE, DOMAINS, recency=3.0, seed=99)
    restored.load_state_dict(replay.state_dict())
    for buffer in (replay, restored):
        add(buffer, 6.0)
    for left, right in zip(replay.sample(8), restored.sample(8), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("recency", [1.0, 3.0])
def test_half_of_a_batch_comes_from_the_newest_transitions(recency: float) -> None:
    replay = ReplayBuffer(64, 1, 1, recency, seed=1)
    for age in reversed(range(64)):
        value = torch.tensor([float(age)])
        replay.add(value, value, value, value)
    ages = replay.sample(20_000).states
    newest = 64 * 0.5**recency  # 32 of 64 for uniform sampling, 8 for recency 3
    assert (ages < newest).float().mean().item() == pytest.approx(0.5, abs=0.02)
