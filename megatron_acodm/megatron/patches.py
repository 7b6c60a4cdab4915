"""Installs and removes the host patches: two, each at the narrowest place that still sees all.

``BlendedMegatronDatasetBuilder.build`` is patched as a method, so that scripts that imported the
class by name are reached; ``schedules.forward_step`` is a module global that every schedule
resolves when it runs. Gradients come from tensor hooks and ``finalize_model_grads`` is wrapped
on the model's config, so neither needs a patch.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any

from megatron_acodm.config import AcodmConfig
from megatron_acodm.megatron.compat import check_host_version, host_symbol
from megatron_acodm.megatron.mixer import Mixer
from megatron_acodm.megatron.run import RunShape

logger = logging.getLogger(__name__)

_BUILD = (
    "megatron.core.datasets.blended_megatron_dataset_builder.BlendedMegatronDatasetBuilder.build"
)
_FORWARD_STEP = "megatron.core.pipeline_parallel.schedules.forward_step"

_originals: list[tuple[Any, str, Any]] = []
_mixer: Mixer | None = None


def patch(
    config: AcodmConfig | None,
    run: RunShape | None = None,
    *,
    domain_names: Mapping[str, str] | None = None,
) -> Mixer | None:
    """Put Megatron's training mixture under the control of a policy.

    Call it before the datasets are built, on every rank. Without a policy (``config`` is None)
    the host behaves exactly as unpatched.

    Args:
        config: what to add to the run, or None for no policy.
        run: sizes of the run; required with a config.
        domain_names: name of each dataset prefix, for reports; by default its file name.

    Returns:
        The mixer that drives the run's steps, or None without a policy.

    Raises:
        UnsupportedHostError: when the installed Megatron-Core is not supported.
        ValueError: when already patched with another configuration.
    """
    global _mixer
    if _originals:
        if _mixer is not None and (config, run) == (_mixer.config, _mixer.run):
            return _mixer
        if _mixer is None and config is None:
            return None
        raise ValueError(
            "Megatron is already patched with another configuration; call "
            "megatron_acodm.unpatch() first"
        )
    check_host_version()
    mixer = None
    if config is not None:
        if run is None:
            raise ValueError(
                "patch(config) needs the run's sizes as well: patch(config, RunShape(…))"
            )
        mixer = Mixer(config, run, domain_names or {})
    replacements = [(host_symbol(path), make) for path, make in _REPLACEMENTS.items()]
    for (owner, name, original), make in replacements:
        setattr(owner, name, make(original))
        _originals.append((owner, name, original))
    _mixer = mixer
    logger.info("patched Megatron-Core; policy: %s", config.mixing.policy if config else "none")
    return mixer


def unpatch() -> None:
    """Restore the host: its functions as they were, the model without hooks."""
    global _mixer
    while _originals:
        owner, name, original = _originals.pop()
        setattr(owner, name, original)
    if _mixer is not None:
        _mixer.close()
        _mixer = None


def _make_build(original: Callable[..., Any]) -> Callable[..., Any]:
    from megatron_acodm.megatron.builder import build_with_online_training_split, training_blend

    @functools.wraps(original)
    def build(self: Any) -> list[Any]:
        # A builder without training data, or one of other data, is none of our business.
        blend = training_blend(self.config)
        if _mixer is None or blend is None or not _mixer.wants(blend[0]):
            return original(self)
        return build_with_online_training_split(self, original, _mixer)

    return build


def _make_forward_step(original: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward_step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if _mixer is not None and _mixer.measurement is not None:
            bound = signature.bind(*args, **kwargs).arguments
            _mixer.measurement.on_forward(bound["forward_data_store"], bound["num_microbatches"])
        return result

    return forward_step


_REPLACEMENTS = {_BUILD: _make_build, _FORWARD_STEP: _make_forward_step}
