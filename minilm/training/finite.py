"""NaN and infinity: noticed at the step where they appear, without asking the device at every step.

What a step gives (losses, the norm of its gradients) is looked at where it lies. The device keeps, for each term, the
number of the first step at which it was not finite; it is read where the device is waited for anyway: at every log,
before an evaluation or a checkpoint, and at the end. On a CPU reading costs nothing, and is done at every step.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NEVER = 2**62
LOSS, GRADIENTS, WEIGHTS = "loss", "gradients", "weights"  # what is watched beside the parts of the loss


class FiniteWatch:
    """The first step at which each of some terms was NaN or infinite.

    Args:
        terms: their names, in the order in which they cause each other: of those of one step the first is told.
        device: where their values come from.
    """

    def __init__(self, terms: Sequence[str], device: torch.device) -> None:
        self._terms = list(terms)
        self._first = torch.full((len(self._terms),), NEVER, dtype=torch.int64, device=device)

    def note(self, step: int, values: Mapping[str, Tensor | float]) -> None:
        """Looks at scalars of a step, which may be sums since an earlier one: NaN and infinity stay in a sum."""
        for term, value in values.items():
            place = self._terms.index(term)
            bad = ~torch.isfinite(torch.as_tensor(value, device=self._first.device))
            self._first[place] = torch.where(bad, self._first[place].clamp(max=step), self._first[place])

    def first(self, gather: Callable[[Tensor], Tensor]) -> tuple[int, list[str]] | None:
        """(step, terms) of the first step with one that was not finite on any rank; None if there is none.

        Args:
            gather: what the ranks have, one after the other along the first dimension; all of them call it.
        """
        steps = gather(self._first).view(-1, len(self._terms)).amin(0).tolist()
        step = min(steps)
        return None if step == NEVER else (step, [self._terms[i] for i, first in enumerate(steps) if first == step])


def all_finite(parameters: Iterable[nn.Parameter]) -> Tensor:
    """1 if every value that this rank holds of the parameters is finite, else NaN; a scalar on their device."""
    held = [parameter.detach() for parameter in parameters]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in held]
    flags = [torch.isfinite(tensor).all() for tensor in local]
    return torch.where(torch.stack(flags).all(), 1.0, torch.nan)


def named_terms(terms: list[str], parts: list[str]) -> str:
    """The terms with their verb: the losses, or where these are finite what came of them."""
    losses = [term for term in terms if term in parts]
    if losses or LOSS in terms:
        return f"the loss ({', '.join(losses)}) is" if losses else "the loss is"
    return "the norm of the gradients is" if GRADIENTS in terms else "weights of the student are"


def without_nan(value: Any) -> Any:
    """The same for JSON, which has no NaN and no infinity: null stands for them."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
