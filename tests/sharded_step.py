"""A step with `own_term` on ranks that hold student and term in shards (FSDP2).

python -m torch.distributed.run --nproc_per_node=2 sharded_step.py FOLDER BATCH ACCUMULATION
"""

from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from one_step import WITH_PARAMETERS, as_script, take_step
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


if __name__ == "__main__":
    as_script(sharded_step)
