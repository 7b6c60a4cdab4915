"""What is decided of a run's mixture, and how a step's statistics become the next decision."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_acodm.blending import DataExhausted, Ledger
from megatron_acodm.config import AcodmConfig
from megatron_acodm.megatron.measurement import StepStatistics
from megatron_acodm.megatron.quota import granule_size, minimum_quota, warn_of_small_domains
from megatron_acodm.megatron.run import RunShape
from megatron_acodm.mixing import POLICIES, MixingController, Observation, Policy, build_policy


@dataclass(frozen=True)
class StepReport:
    """What a finished step tells the metrics; K domains."""

    statistics: StepStatistics
    weights: np.ndarray  # [K] that drew this step's batch
    samples: np.ndarray  # [K] sequences in this step's batch
    epochs: np.ndarray  # [K] how often each domain has been gone through, this batch included
    rewards: np.ndarray | None  # [K], nan where unknown; only on rank 0
    diagnostics: dict[str, float]  # of the policy; only on rank 0


class Decisions:
    """The ledger, which every rank holds, and the policy, which rank 0 alone keeps.

    ``follow_up`` may run in another thread than the methods that ask for what is decided.

    Args:
        config: what is added to the run.
        run: its sizes.
        domains: names of the K domains.
        sizes: sequences an epoch of each.
        weights: the host's own blend weights, which then stand for the natural ones, or None.
        checksums: of each domain's data.

    Raises:
        ValueError: for domains, settings and data that do not fit together.
    """

    def __init__(
        self,
        config: AcodmConfig,
        run: RunShape,
        domains: Sequence[str],
        sizes: Sequence[int],
        weights: Sequence[float] | None,
        checksums: Sequence[int],
    ) -> None:
        self._config, self._run = config, run
        self.domains, self._sizes, self._checksums = list(domains), list(sizes), list(checksums)
        blending = config.blending
        policy = POLICIES[config.mixing.policy]
        self.needs_alignment = policy.compares_gradients(config.mixing)
        self.needs_probes = policy.needs_probes
        self._granule_size = granule_size(blending, config.alignment, run, self.needs_alignment)
        self._minimum = minimum_quota(
            blending,
            len(domains),
            run.global_batch_size // self._granule_size,
            self.needs_alignment,
        )
        # Every rank builds the policy, so that bad settings fail on every rank alike.
        controller = MixingController(self._build_policy(weights), config.mixing)
        named = None if weights is None else dict(zip(domains, weights, strict=True))
        self._blend_weights = _shares(named)
        self.needs_affinity = controller.needs_affinity
        self.controller = controller if _rank() == 0 else None
        self.ledger = Ledger(
            self._sizes,
            self._granule_size,
            run.seed,
            names=self.domains,
            max_epochs=blending.max_epochs,
            stop_at_cap=blending.repetition == "error",
        )
        self.exhausted: DataExhausted | None = None
        self._lock = threading.Lock()  # of the ledger, and of why it ends
        self._append_ahead(0, controller.initial_weights)
        if self.ledger.num_samples == 0:
            raise ValueError(
                f"there is not enough data for the first step: {self.exhausted}; lower the "
                "batch size, or change blending.repetition"
            )
        warn_of_small_domains(self.ledger, blending)

    def _build_policy(self, weights: Sequence[float] | None) -> Policy:
        return build_policy(
            self._config.mixing,
            self.domains,
            np.asarray(self._sizes if weights is None else weights, dtype=np.float64),
            self._config.alignment.num_probes,
            self._run.train_iters,
            self._run.seed,
            lowest_share=self._minimum * self._granule_size / self._run.global_batch_size,
        )

    @property
    def data(self) -> list[tuple[int, int]]:
        """Sequences an epoch and checksum of each domain's data."""
        return list(zip(self._sizes, self._checksums, strict=True))

    def num_samples(self, consumed_samples: int) -> int:
        """Sequences of the step that starts at this sample; 0 when nothing is left to draw.

        Raises:
            RuntimeError: when no step of the ledger starts there.
        """
        with self._lock:
            if consumed_samples == self.ledger.num_samples and self.exhausted is not None:
                return 0
            first, count = self.ledger.stage_at(consumed_samples)
        if first != consumed_samples:
            raise RuntimeError(
                f"a step starts at sample {consumed_samples}, the ledger's at {first} and "
                f"{first + count}; give the mixer the batch sizes (and the ramp-up) of the host"
            )
        return count

    def weights_of(self, consumed_samples: int) -> np.ndarray:
        """[K] weights that draw the step which starts at this sample."""
        with self._lock:
            return self.ledger.weights_at(consumed_samples)

    def is_decided(self, consumed_samples: int) -> bool:
        """Whether the ledger has the step that starts at this sample."""
        with self._lock:
            return consumed_samples < self.ledger.num_samples

    def domains_of(self, samples: np.ndarray) -> np.ndarray:
        """Domain [N] int32 of samples [N] int64."""
        with self._lock:
            return self.ledger.locate(samples)[0]

    def samples_of_step(self, consumed_samples: int) -> np.ndarray:
        """[K] sequences of each domain in the step that starts at this sample."""
        with self._lock:
            return self.ledger.counts(consumed_samples, self.ledger.stage_at(consumed_samples)[1])

    def follow_up(
        self,
        iteration: int,
        consumed_samples: int,
        statistics: StepStatistics,
        control: dist.ProcessGroup,
    ) -> StepReport:
        """From a step's statistics to the stage that they decide; collective over ``control``.

        Raises:
            RuntimeError: the ranks' ledgers differ.
        """
        with self._lock:
            weights = self.ledger.weights_at(consumed_samples)
            count = self.ledger.stage_at(consumed_samples)[1]
            samples = self.ledger.counts(consumed_samples, count)
            epochs = self.ledger.epochs(before=consumed_samples + count)
            available = self.ledger.drawable()
        decision = np.zeros(len(self.domains))
        rewards, diagnostics = None, {}
        if self.controller is not None:
            observation = Observation(
                iteration=iteration,
                progress=min(1.0, iteration / self._run.train_iters),
                weights=weights,
                # What was drawn but is masked in the loss was not seen.
                samples=np.where(statistics.tokens > 0, samples, 0),
                available=available,
                loss=statistics.loss,
                alignment=statistics.alignment,
                grad_sq_norm=statistics.grad_sq_norm,
                affinity=statistics.affinity,
                weight_norm=statistics.weight_norm,
                weight_delta_norm=statistics.weight_delta_norm,
            )
            decision = self.controller.decide(observation)
            rewards, diagnostics = self.controller.rewards, self.controller.diagnostics()
        agreed = self._agree_on(decision, control)
        with self._lock:
            self._append_ahead(consumed_samples + count, agreed)
        return StepReport(statistics, weights, samples, epochs, rewards, diagnostics)

    def _append_ahead(self, consumed_samples: int, weights: np.ndarray) -> None:
        """Decide all steps up to the lag behind the one that starts here, where they are not.

        Other weights may be possible where the last ones were not: each call tries anew, as the
        first one of a resumed run does.
        """
        self.exhausted = None
        end = consumed_samples
        for _ in range(1 + self._config.blending.decision_lag):
            end += self._run.batch_size(end)
        while self.ledger.num_samples < end and self.exhausted is None:
            count = self._run.batch_size(self.ledger.num_samples)
            fits = self._minimum * len(self.domains) * self._granule_size <= count
            try:
                self.ledger.append(weights, count, minimum=self._minimum if fits else 0)
            except DataExhausted as error:
                self.exhausted = error

    def _agree_on(self, decision: np.ndarray, control: dist.ProcessGroup) -> np.ndarray:
        """Rank 0's decision, on every rank; also checks that the ledgers are still the same."""
        message = torch.from_numpy(np.append(decision, float(self.ledger.digest)))
        dist.broadcast(message, src=0, group=control)
        if int(message[-1]) != self.ledger.digest:
            raise RuntimeError(
                f"the ledger of rank {_rank()} differs from rank 0's (digest "
                f"{self.ledger.digest}, rank 0 has {int(message[-1])}); ranks would train on "
                "wrong domains. Resume from the last checkpoint"
            )
        return message[:-1].numpy()

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for a resumed run to draw the same samples."""
        fingerprint = {
            "domains": {
                name: {"sequences": size, "checksum": checksum}
                for name, size, checksum in zip(
                    self.domains, self._sizes, self._checksums, strict=True
                )
            },
            "policy": self._config.mixing.policy,
            "mixing.weights": _shares(self._config.mixing.weights),
            # They stand for the natural ones.
            "blend weights": self._blend_weights,
            # Rewards of another kind, for another objective, or of other gradients, must not be
            # averaged with the saved ones.
            "reward": self._config.mixing.agent.reward,
            "objective": self._config.mixing.agent.objective,
            # The first mixture says how much a domain counts in the objective.
            "initial weights": self._config.mixing.initial_weights,
            "alignment": {
                name: value
                for name, value in asdict(self._config.alignment).items()
                if name != "gram_interval"  # a matter of records
            },
            "decision lag": self._config.blending.decision_lag,
            "granule": self._config.blending.granule,
            "minimum quota": self._config.blending.minimum_quota,
            **{
                name.replace("_", " "): value
                for name, value in asdict(self._run).items()
                if name != "train_iters"  # a run may be extended
            },
        }
        return json.loads(json.dumps(fingerprint))  # as it will be read back

    def continue_from(self, consumed_samples: int, control: dist.ProcessGroup | None) -> None:
        """Decide what is not decided yet after ledger and policy were restored; collective.

        That is nothing, unless the run was saved when its data was used up, or has other data now.

        Args:
            consumed_samples: sequences drawn so far.
            control: of all ranks; None where one process looks at what a run would do.
        """
        weights = np.zeros(len(self.domains))
        if self.controller is not None:
            weights = self.controller.weights_to_resume_with()
        agreed = weights if control is None else self._agree_on(weights, control)
        self._append_ahead(consumed_samples, agreed)


def _shares(weights: Mapping[str, float] | None) -> dict[str, float] | None:
    """``weights`` on the scale of shares, in an order that does not depend on theirs."""
    if weights is None:
        return None
    total = sum(weights.values())
    return {name: round(weights[name] / total, 9) for name in sorted(weights)}


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0
