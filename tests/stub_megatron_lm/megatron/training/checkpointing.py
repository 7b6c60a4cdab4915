"""The host's checkpoints: a folder an iteration, announced in a file when it is complete."""

import json
import shutil
from pathlib import Path

from megatron.training import global_vars


def get_checkpoint_name(checkpoints_path, iteration, release=False, return_base_dir=False):
    folder = Path(checkpoints_path) / f"iter_{iteration:07d}"
    return str(folder if return_base_dir else folder / "mp_rank_00" / "model_optim_rng.pt")


def get_checkpoint_tracker_filename(checkpoints_path):
    return str(Path(checkpoints_path) / "latest_checkpointed_iteration.txt")


def announce(tracker, iteration):
    Path(tracker).write_text(str(iteration), encoding="utf-8")


def save_checkpoint(iteration, model, optimizer, opt_param_scheduler):
    args = global_vars.args
    file = Path(get_checkpoint_name(args.save, iteration))
    assert not file.parent.parent.exists() or args.overwrites, "the folder was not the host's"
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {"iteration": iteration, "consumed_train_samples": args.consumed_train_samples}
    file.write_text(json.dumps(state), encoding="utf-8")
    tracker = get_checkpoint_tracker_filename(args.save)
    before = Path(tracker).read_text(encoding="utf-8") if Path(tracker).exists() else None
    announce(tracker, iteration)
    if before is not None and not args.overwrites:
        shutil.rmtree(get_checkpoint_name(args.save, int(before), return_base_dir=True))


def _load_base_checkpoint(load_dir, args, rank0=False):
    tracker = Path(get_checkpoint_tracker_filename(load_dir))
    if not tracker.exists():
        return None, "", False, None
    name = get_checkpoint_name(load_dir, int(tracker.read_text(encoding="utf-8")))
    return json.loads(Path(name).read_text(encoding="utf-8")), name, False, "legacy"


def load_checkpoint(model, optimizer, opt_param_scheduler):
    args = global_vars.args
    state, _, _, _ = _load_base_checkpoint(args.load, args)
    if state is None:
        return 0
    args.consumed_train_samples = state["consumed_train_samples"]
    return state["iteration"]
