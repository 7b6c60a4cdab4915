"""The host's loop. Only what is called by these names, when it is called, counts."""

from functools import partial

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from megatron.training import global_vars
from megatron.training.checkpointing import load_checkpoint, save_checkpoint


def get_args():
    return global_vars.args


def get_tensorboard_writer():
    return global_vars.args.tensorboard_writer


def get_wandb_writer():
    return None


def print_rank_last(message):
    print(message)


def initialize_megatron(args, allow_no_cuda=False, skip_mpu_initialization=False):
    assert args.hidden_size % args.num_attention_heads == 0
    global_vars.args = args


def update_train_iters(args):
    args.train_iters = args.train_iters or args.train_samples // args.global_batch_size


def setup_model_and_optimizer(model):
    args = get_args()
    update_train_iters(args)
    args.iteration = load_checkpoint(model, None, None) if args.load else 0
    return model.chunks, model.optimizer, model.scheduler


def build_train_valid_test_data_loaders(build_train_valid_test_datasets_provider):
    args = get_args()
    train, _, _ = build_train_valid_test_datasets_provider([32, 8, 8])
    batches = range(args.consumed_train_samples, len(train), args.micro_batch_size)
    sampler = [list(range(first, first + args.micro_batch_size)) for first in batches]
    return torch.utils.data.DataLoader(train, batch_sampler=sampler), None, None


def build_train_valid_test_data_iterators(build_train_valid_test_datasets_provider):
    loaders = build_train_valid_test_data_loaders(build_train_valid_test_datasets_provider)
    return iter(loaders[0])


def dummy_train_step(data_iterator):
    for _ in range(get_args().global_batch_size // get_args().micro_batch_size):
        next(data_iterator)


def train_step(
    forward_step_func,
    data_iterator,
    model,
    optimizer,
    opt_param_scheduler,
    config,
    forward_backward_func,
    iteration=None,
):
    args = get_args()
    model[0].zero_grad_buffer()
    optimizer.zero_grad()
    forward_backward_func(
        forward_step_func=forward_step_func,
        data_iterator=data_iterator,
        model=model,
        num_microbatches=args.global_batch_size // args.micro_batch_size,
        seq_length=args.seq_length,
        micro_batch_size=args.micro_batch_size,
        forward_only=False,
    )
    if iteration == args.rejected_iteration:
        return {}, True, True, True, 16, None, None, 0
    _, grad_norm, _ = optimizer.step()
    return {}, 0, False, False, 0, grad_norm, None, 0


def training_log(iteration):
    print_rank_last(f" iteration {iteration:8d}/{get_args().train_iters:8d} |")


def train(forward_step_func, model, optimizer, opt_param_scheduler, iterator, config):
    args = get_args()
    iteration = args.iteration
    while iteration < args.train_iters:
        if iteration in args.iterations_to_skip:
            dummy_train_step(iterator)
            iteration += 1
            args.consumed_train_samples += args.global_batch_size
            continue
        args.curr_iteration = iteration
        _, _, should_checkpoint, should_exit, exit_code, _, _, _ = train_step(
            forward_step_func,
            iterator,
            model,
            optimizer,
            opt_param_scheduler,
            config,
            get_forward_backward_func(),
            iteration=iteration,
        )
        save = partial(save_checkpoint, model=model, optimizer=None, opt_param_scheduler=None)
        if should_checkpoint:
            save(iteration)
        if should_exit:
            raise SystemExit(exit_code)
        iteration += 1
        args.consumed_train_samples += args.global_batch_size
        training_log(iteration)
        if args.save and iteration % args.save_interval == 0:
            save(iteration)
        if iteration == args.exit_interval:
            raise SystemExit(0)
    return iteration


def pretrain(args, train_valid_test_dataset_provider, model, forward_step_func):
    initialize_megatron(args)
    chunks, optimizer, scheduler = setup_model_and_optimizer(model)
    iterator = build_train_valid_test_data_iterators(train_valid_test_dataset_provider)
    config = get_model_config(chunks[0])
    iteration = train(forward_step_func, chunks, optimizer, scheduler, iterator, config)
    if args.save and iteration != 0 and iteration % args.save_interval != 0:
        save_checkpoint(iteration, chunks, optimizer, scheduler)
