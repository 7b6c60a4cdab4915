"""The training dataset of an online mixture: sample by sample, what the ledger says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from megatron_acodm.blending.live import LedgerReader


class OnlineBlendedDataset(Dataset):
    """Stands where Megatron's ``BlendedDataset`` would, with a mixture that is decided as it goes.

    Samplers that draw indices in order need no change (``MegatronPretrainingSampler``); one that
    draws at random over the whole run (``--dataloader-type cyclic``) cannot work, as most of the
    run is not decided. Works with any number of workers, forked or spawned.
    """

    def __init__(
        self,
        datasets: Sequence[Any],
        reader: LedgerReader,
        size: int,
        names: Sequence[str] | None = None,
    ) -> None:
        """Bind the domains' data to a ledger.

        Args:
            datasets: one per domain, in the ledger's order, each of one epoch.
            reader: of the run's ledger.
            size: samples of the whole run (training steps times global batch size), which
                Megatron's samplers take as the length.
            names: of the domains, for messages.

        Raises:
            ValueError: when the datasets are not those that the ledger was made for.
        """
        names = [f"domain {k}" for k in range(len(datasets))] if names is None else list(names)
        if len(datasets) != len(reader.sizes) or len(names) != len(datasets):
            raise ValueError(
                f"{len(datasets)} datasets and {len(names)} names were given for a ledger of "
                f"{len(reader.sizes)} domains"
            )
        for name, dataset, expected in zip(names, datasets, reader.sizes.tolist(), strict=True):
            if len(dataset) != expected:
                raise ValueError(
                    f"the dataset of domain {name!r} has {len(dataset)} sequences, its ledger "
                    f"expects {expected}; build the dataset for exactly one epoch"
                )
        if size < 1:
            raise ValueError(f"size is {size}; a run has at least 1 sample")
        self.datasets = list(datasets)
        self.names = names
        self.size = size
        self.split = getattr(datasets[0], "index_split", None)
        self._reader = reader

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Sample ``index`` of the run, as a domain's dataset gives it, with its ``dataset_id``.

        Raises:
            IndexError: for an index outside the run.
            TimeoutError: in a worker, when the sample is not decided in time.
            RuntimeError: when it cannot be decided any more (``LedgerReader.wait_for``).
        """
        index = int(index)
        if not 0 <= index < self.size:
            raise IndexError(f"sample {index} is outside the run of {self.size} samples")
        domain, sequence = self._reader.sequence(index)
        return {"dataset_id": domain, **self.datasets[domain][sequence]}
