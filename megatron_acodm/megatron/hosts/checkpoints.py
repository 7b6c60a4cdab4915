"""The policy's sidecar within a host's own checkpoints, as they are saved and loaded.

Rank 0 writes the sidecar under a temporary name, while nothing of the checkpoint is there yet, and
renames it into the checkpoint's folder right before the host announces it. A crash at any moment
leaves either both or neither; the host deletes both with the folder.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch.distributed as dist

from megatron_acodm.files import sync
from megatron_acodm.megatron.compat import UnsupportedHostError
from megatron_acodm.megatron.mixer import Mixer
from megatron_acodm.megatron.sidecar import FOLDER, load_sidecar, save_sidecar

_STAGING = ".acodm_being_saved"


class CheckpointLifeCycle:
    """One run's saves and its load.

    Args:
        host: its name, for messages.
        folder_of: the folder of an iteration's checkpoint, from the root and the iteration.
    """

    def __init__(self, host: str, folder_of: Callable[[Path, int], Path]) -> None:
        self._host, self._folder_of = host, folder_of
        self._staged: tuple[Path, Path] | None = None
        self.loaded_from: str | None = None
        """The file or folder that the host has read the model from."""

    @contextlib.contextmanager
    def saving(self, mixer: Mixer, root: Path, iteration: int) -> Iterator[None]:
        """Around the host's save of an iteration to a folder of ``root``; collective."""
        staging = root / _STAGING
        if dist.get_rank() == 0:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        save_sidecar(mixer, staging, iteration)
        if dist.get_rank() == 0:
            self._staged = staging, self._folder_of(root, iteration)
        try:
            yield
            if self._staged is not None:
                raise UnsupportedHostError(
                    f"{self._host} saved iteration {iteration} without asking for its tracker "
                    "file, so the policy was not saved with it; this version is not supported"
                )
        finally:
            self._staged = None

    def put_in_place(self) -> None:
        """Move a sidecar that is being saved into its checkpoint, on rank 0."""
        if self._staged is None:
            return
        (staging, folder), self._staged = self._staged, None
        final = folder / FOLDER
        aside = _set_aside(folder)
        if final.is_dir():  # of an earlier save of this iteration, which may be announced
            shutil.rmtree(aside, ignore_errors=True)
            final.rename(aside)
        (staging / FOLDER).rename(final)
        sync(folder)
        shutil.rmtree(aside, ignore_errors=True)
        staging.rmdir()

    def restore(self, mixer: Mixer, iteration: int, consumed: int, *, adopt: bool) -> None:
        """Go on where the checkpoint that the host has loaded was saved; collective.

        Args:
            mixer: of this run.
            iteration: steps that it was saved after.
            consumed: sequences that were drawn in them.
            adopt: accept other domains, or other data of theirs.

        Raises:
            ValueError: when its sidecar is damaged or of a run that differs, or batch sizes were
                other ones.
        """
        planned = mixer.run.samples_before(iteration)
        if consumed != planned:
            raise ValueError(
                f"the checkpoint of iteration {iteration} was saved after "
                f"{consumed} sequences, with the batch sizes given now it would "
                f"be {planned}; give those that it was saved with"
            )
        path = Path(self.loaded_from or "")
        folders = [p for p in (path, *path.parents) if p.name.startswith("iter_")]
        if not folders:
            raise ValueError(
                f"the host has loaded iteration {iteration} from {self.loaded_from}, which is "
                "no folder of a checkpoint; an online policy cannot go on from it"
            )
        if dist.get_rank() == 0:
            aside = _set_aside(folders[0])
            if aside.is_dir() and not (folders[0] / FOLDER).is_dir():  # killed between two renames
                aside.rename(folders[0] / FOLDER)
        dist.barrier()
        load_sidecar(mixer, folders[0], iteration, adopt=adopt)


def _set_aside(folder: Path) -> Path:
    return folder / f"{FOLDER}.old"
