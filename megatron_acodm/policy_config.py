"""Settings of the online policies: the agent, and published ones to compare it against."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_acodm.checks import require, require_in_range

ODM_RULES = ("code", "paper")
OBJECTIVES = ("perplexity", "loss", "batch")
REWARDS = ("alignment", "loss")


@dataclass(frozen=True)
class AgentConfig:
    """The actor-critic agent of policy ``acodm`` (paper section 3; DDPG)."""

    objective: str = "perplexity"
    """What the mixture is to lower: one of OBJECTIVES.

    ``perplexity``: the mean of the domains' perplexities. ``loss``: the mean of their losses.
    Both are weighted by the first mixture: a domain counts as much as ``initial_weights`` gives it.
    ``batch``: the loss of the batch as drawn, without a domain's part in its own; the paper's.
    """

    reward: str = "alignment"
    """What a domain is drawn for: one of REWARDS.

    ``alignment``: how its gradient serves the objective. ``loss``: its loss, which needs no
    gradients, as policy ``odm`` has it; the objective then gives the prior only.
    """

    hidden_size: int = 128
    """Width of every hidden layer of actor and critic (paper: 1024).

    Networks learn as fast at another width if both learning rates are divided by as much as the
    width is multiplied by.
    """

    num_layers: int = 2
    """Hidden layers of actor and of critic (paper: 5)."""

    actor_lr: float = 2e-4
    """Adam learning rate of the actor."""

    critic_lr: float = 6e-4
    """Adam learning rate of the critic."""

    prior_strength: float = 1.0
    """lambda: the actor ascends Q - lambda KL(mixture || prior) (paper: 0).

    The prior is the mixture that descends on the objective: for ``perplexity`` the first mixture
    times the domains' perplexities as they fall, for the others the first mixture. Rewards are in
    standard deviations of one measurement, so at 1 a domain whose reward stays one above the mean
    is worth e times its prior share.
    """

    gamma: float = 0.5
    """Discount of the next state's value (paper: 0.95)."""

    tau: float = 0.001
    """Share of the online networks that the targets take over at each update (paper: 0.001)."""

    replay_capacity: int = 10_000
    """Transitions kept; the oldest leave first (paper: 10,000)."""

    replay_batch_size: int = 32
    """Transitions per update (paper: 32)."""

    replay_recency: float = 3.0
    """How much newer transitions are preferred: age = size * u^recency (1: uniform, the paper)."""

    exploration_std: float = 0.02
    """Standard deviation of the noise added to the weights while exploring (paper: 0.02).

    Of more than 22 domains, the paper's number K, it is as much smaller as 22 / K.
    """

    exploration_fraction: float = 0.02
    """Share of the run's steps that explore (paper: 833 of 41,667 steps)."""

    reward_smoothing: float = 0.97
    """xi in reward <- xi * reward + (1 - xi) * measured, for each domain and step.

    A domain that is measured again after t steps takes xi^t.
    """

    updates_per_step: int = 1
    """Gradient updates of actor and critic per training step."""

    def __post_init__(self) -> None:
        require(
            self.objective in OBJECTIVES,
            f"agent.objective is {self.objective!r}; the objectives are {', '.join(OBJECTIVES)}",
        )
        require(
            self.reward in REWARDS,
            f"agent.reward is {self.reward!r}; the rewards are {', '.join(REWARDS)}",
        )
        for name in (
            "hidden_size",
            "num_layers",
            "replay_capacity",
            "replay_batch_size",
            "updates_per_step",
        ):
            value = getattr(self, name)
            require(value >= 1, f"agent.{name} is {value}; it must be at least 1")
        for name in ("actor_lr", "critic_lr"):
            value = getattr(self, name)
            require(value > 0, f"agent.{name} is {value}; it must be positive")
        require_in_range("agent.prior_strength", self.prior_strength, 0.0, 1e3)
        for name in ("gamma", "tau", "reward_smoothing", "exploration_fraction"):
            require_in_range(f"agent.{name}", getattr(self, name), 0.0, 1.0)
        require(
            self.replay_recency >= 1.0,
            f"agent.replay_recency is {self.replay_recency}; it must be at least 1 (uniform)",
        )
        require_in_range("agent.exploration_std", self.exploration_std, 0.0, 1.0)
        require(
            self.replay_batch_size <= self.replay_capacity,
            f"agent.replay_batch_size is {self.replay_batch_size}, more than "
            f"agent.replay_capacity {self.replay_capacity}; lower the batch or raise the capacity",
        )


@dataclass(frozen=True)
class OdmConfig:
    """Policy ``odm`` (Albalak et al. 2023, arXiv 2312.02406)."""

    rule: str = "code"
    """One of ODM_RULES.

    ``code``: weights in proportion to smoothed perplexities, as in the authors' code, which the
    weights of their runs agree with. ``paper``: exponential in smoothed losses over weights, as in
    algorithm 1; nearly uniform late in a run.
    """

    smoothing: float = 0.5
    """alpha in reward <- alpha * reward + (1 - alpha) * new (published scripts: 0.5)."""

    warmup_fraction: float = 0.02
    """Share of the run's steps with the initial weights (published scripts: 2000 of 100,000)."""

    def __post_init__(self) -> None:
        require(
            self.rule in ODM_RULES,
            f"odm.rule is {self.rule!r}; the rules are {', '.join(ODM_RULES)}",
        )
        for name in ("smoothing", "warmup_fraction"):
            require_in_range(f"odm.{name}", getattr(self, name), 0.0, 1.0)


@dataclass(frozen=True)
class AdoConfig:
    """Policy ``ado`` (Jiang et al. 2024, arXiv 2410.11820)."""

    warmup_fraction: float = 1 / 60
    """Share of the run's steps that no scaling law is fitted to (published code: 1000 of 60,000).

    The first law is fitted one ``refit_fraction`` later; until then the initial weights hold.
    """

    refit_fraction: float = 1 / 60
    """Share of the run's steps between fits, 10 steps at least (published code: 1000 of 60,000)."""

    credit_smoothing: float = 0.1
    """gamma_1: how fast a domain's credit follows its weight (paper: 0.1)."""

    credit_exponent: float = 0.5
    """s: the preference takes in the credit to this power (paper: 0.5)."""

    preference_share: float = 0.1
    """gamma_2: share of today's preference in the weights, beside its average (paper: 0.1)."""

    def __post_init__(self) -> None:
        for name in ("credit_smoothing", "credit_exponent", "preference_share", "warmup_fraction"):
            require_in_range(f"ado.{name}", getattr(self, name), 0.0, 1.0)
        require(
            0.0 < self.refit_fraction <= 1.0,
            f"ado.refit_fraction is {self.refit_fraction}; it must lie in (0, 1]",
        )


@dataclass(frozen=True)
class PikeConfig:
    """Policy ``pike`` (Li et al. 2025, arXiv 2502.06244).

    The paper tunes both rates to each model; the defaults are ours.
    """

    norm_rate: float = 0.05
    """zeta_1: gain in log weight an update of a domain whose squared gradient norm is average.

    In units of that average, as raw norms depend on the model.
    """

    variance_rate: float = 0.05
    """zeta_2: twice the loss in log weight an update of a domain whose variance is average."""

    update_fraction: float = 0.01
    """Share of the run's steps between updates of the weights, 10 steps at least."""

    def __post_init__(self) -> None:
        for name in ("norm_rate", "variance_rate"):
            require_in_range(f"pike.{name}", getattr(self, name), 0.0, 10.0)
        require(
            0.0 < self.update_fraction <= 1.0,
            f"pike.update_fraction is {self.update_fraction}; it must lie in (0, 1]",
        )
