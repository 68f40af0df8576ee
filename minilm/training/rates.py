"""Learning rates of their own for some of the student's parameters."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from minilm.errors import UsageError
from minilm.training.feeding import FeedingTrainer


class RatesTrainer(FeedingTrainer):
    """A Trainer that multiplies the learning rate of some parameters by a factor.

    Args:
        learning_rate_factors: by the student's names of parameters; 0 freezes, those left out have 1.

    Raises (from `create_optimizer`):
        ValueError: an optimiser that hides its parameters, so that they have one rate.
    """

    def __init__(self, *, learning_rate_factors: Mapping[str, float] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._factors = dict(learning_rate_factors or {})
        for name, factor in self._factors.items():
            if factor == 0:
                self.student.get_parameter(name).requires_grad_(False)

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """As the Trainer's, with a group of parameters for each rate."""
        is_there = self.optimizer is not None
        optimizer: Optimizer = super().create_optimizer(model)
        if not is_there:
            _split_groups(optimizer, model or self.model, self._factors)
        return optimizer


def _split_groups(optimizer: Optimizer, model: Any, factors: Mapping[str, float]) -> None:
    """Moves what has a factor from its group into one of the same options with that part of the learning rate."""
    trained = ((name.partition("student.")[2], p) for name, p in model.named_parameters() if p.requires_grad)
    factor_of = {id(p): factors[name] for name, p in trained if factors.get(name, 1.0) != 1}
    moved = 0
    for group in list(optimizer.param_groups):
        for factor in sorted({factor_of[id(p)] for p in group["params"] if id(p) in factor_of}):
            own = [p for p in group["params"] if factor_of.get(id(p)) == factor]
            group["params"] = [p for p in group["params"] if factor_of.get(id(p)) != factor]
            optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * factor})
            moved += len(own)
    if moved != len(factor_of):
        raise UsageError(
            f"{len(factor_of)} parameters have learning rates of their own, and {type(optimizer).__name__} has "
            f"{moved} of them in its groups: take another optimiser"
        )
