"""A step with `own_term` on ranks that hold student and term in shards (FSDP2)."""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from one_step import WITH_PARAMETERS, take_step
from own_term import objective


def as_gpus() -> None:
    """accelerate shards on no CPUs, though PyTorch can."""
    set_up: Any = PartialState.__init__

    def init(state: PartialState, *args: Any, **options: Any) -> None:
        set_up(state, *args, **options)
        if state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


def one_step(folder: Path, batch: int, accumulation: int, **sharding: Any) -> None:
    run = take_step(folder, batch, accumulation, criterion=objective(), **WITH_PARAMETERS, **sharding)
    assert run.is_fsdp_enabled == bool(sharding)
    run.end()


def sharded_step(folder: Path, batch: int, accumulation: int) -> None:
    as_gpus()
    one_step(folder, batch, accumulation, fsdp=True, fsdp_config={"version": 2})
