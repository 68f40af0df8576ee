"""Which training arguments of transformers mean nothing here."""

import os

from accelerate import DistributedType
from transformers import TrainingArguments
from transformers.debug_utils import DebugOption
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from minilm.errors import UsageError
from minilm.values import find_fault


def check_numbers(args: TrainingArguments) -> None:
    if fault := find_fault(vars(args), [type(args)]):
        raise UsageError(f"{fault.name} {fault.must}, got {fault.value}")


def check_arguments(args: TrainingArguments) -> None:
    """Raises `ValueError` for training arguments that mean nothing here."""
    check_numbers(args)
    if args.n_gpu > 1:
        raise UsageError(
            f"{args.n_gpu} GPUs are visible to one process: start one process each (torchrun "
            f"--nproc_per_node {args.n_gpu} -m minilm.cli ...), or show it one GPU with CUDA_VISIBLE_DEVICES=0"
        )
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if processes > 1 and args.distributed_state.distributed_type is DistributedType.NO:
        raise UsageError(f"{processes} processes were started, but each would train alone: without a GPU add --use_cpu")
    if args.fsdp and args.distributed_state.distributed_type in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise UsageError(
            f"fsdp={args.fsdp} has no effect here: accelerate shards a student over several GPUs, not over {processes} "
            f"{'process' if processes == 1 else 'processes'} on {args.device.type}: leave it out"
        )
    if args.max_steps <= 0 and args.num_train_epochs <= 0:
        raise UsageError(
            f"num_train_epochs is {args.num_train_epochs} and max_steps {args.max_steps}: no step to train"
        )
    if args.label_smoothing_factor:
        raise UsageError(
            f"label_smoothing_factor={args.label_smoothing_factor} means nothing here: there are no labels"
        )
    if args.neftune_noise_alpha is not None:
        raise UsageError(
            f"neftune_noise_alpha={args.neftune_noise_alpha} is not supported: only the student's input would get noise"
        )
    if isinstance(options := args.gradient_checkpointing_kwargs, dict) and options.get("use_reentrant"):
        raise UsageError("use_reentrant=True is not supported: reentrant checkpointing gives q, k and v no gradient")
    if not args.eval_do_concat_batches:
        raise UsageError("eval_do_concat_batches=False is not supported: losses are averaged over all batches")
    if args.eval_strategy == "no" and (args.load_best_model_at_end or args.save_strategy == "best"):
        wanted = "load_best_model_at_end" if args.load_best_model_at_end else "save_strategy='best'"
        raise UsageError(f"{wanted} needs eval_strategy 'steps' or 'epoch': without evaluations there is no best")
    if DebugOption.UNDERFLOW_OVERFLOW in args.debug:
        raise UsageError("debug='underflow_overflow' is not supported; a loss that is NaN or infinite ends the run")
    if args.label_names is not None:
        raise UsageError(f"label_names={args.label_names} means nothing here: there are no labels")
    if args.use_liger_kernel:
        raise UsageError("use_liger_kernel=True is not supported: it changes models that stand alone, not the student")
    try:
        reporters = get_reporting_integration_callbacks(args.report_to)  # type: ignore[no-untyped-call]
    except ValueError as unknown:
        raise UsageError(f"report_to={args.report_to}: {unknown}") from None
    for reporter in reporters:
        try:
            reporter()
        except RuntimeError as missing:  # the package that it reports to
            raise UsageError(f"report_to={args.report_to}: {missing}") from None
