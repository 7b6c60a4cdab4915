"""Door for Megatron-Bridge (NeMo): one call before its ``pretrain``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_acodm.config import AcodmConfig

if TYPE_CHECKING:
    from megatron_acodm.megatron.hosts.megatron_bridge import MegatronBridge

_prepared: MegatronBridge | None = None


def prepare(
    config: AcodmConfig | str | Path | None,
    *,
    run_dir: str | Path | None = None,
    adopt: bool = False,
    save_policy: str | None = None,
) -> None:
    """Let the next ``megatron.bridge`` pretraining of this process draw its data by a policy.

    Call it on every rank before ``pretrain(…)``, which is left as it is::

        megatron_acodm.bridge.prepare("mix.yaml")
        pretrain(config, forward_step)

    When that ends, Megatron-Bridge is as it was. What cannot work is refused when ``pretrain`` sets
    the run up, with each reason.

    Args:
        config: the policy and its settings, or a YAML file of them; None for no policy.
        run_dir: for ``metrics.jsonl``, which the report reads; default: ``acodm`` in the folder of
            checkpoints, or of TensorBoard.
        adopt: go on from a checkpoint although domains came, went or have other data.
        save_policy: policy ``acodm``: file for what it learned, at every checkpoint and the end.

    Raises:
        UnsupportedHostError: when the installed Megatron-Bridge is not one that is known.
        ValueError: for a bad configuration.
    """
    global _prepared
    from megatron_acodm.megatron.hosts.loop import LaunchOptions
    from megatron_acodm.megatron.hosts.megatron_bridge import MegatronBridge

    if _prepared is not None:
        _prepared.uninstall()
        _prepared = None
    if config is None:
        return
    if not isinstance(config, AcodmConfig):
        config = AcodmConfig.from_yaml(config)
    if save_policy is not None and config.mixing.policy != "acodm":
        raise ValueError(
            f"save_policy is for policy 'acodm', not {config.mixing.policy!r}, which has learned "
            "nothing to save; remove it"
        )
    folder = None if run_dir is None else Path(run_dir)
    _prepared = MegatronBridge(LaunchOptions(config, folder, adopt, save_policy))
    _prepared.install()
