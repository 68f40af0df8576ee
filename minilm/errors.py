"""Errors that end a run, and those of other libraries told in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or a weight is NaN or infinite: one sentence on what, at which step, and what was kept."""


class UsageError(ValueError):
    """What was asked for cannot be had: one sentence for users, with the values that do not go together."""


class TrialError(UsageError):
    """What was asked for failed when it was tried: one sentence on what it was and why."""


@contextmanager
def tried(what: str) -> Iterator[None]:
    """Around something that arguments ask for: an error becomes a `TrialError` that begins with `what`.

    Errors of the system, `UsageError` and `NonFiniteError` stay what they are.
    """
    try:
        yield
    except (OSError, UsageError, NonFiniteError):
        raise
    except torch.OutOfMemoryError as error:
        raise TrialError(f"{what}: {first_line(error)}; lower --per_device_train_batch_size") from error
    except Exception as error:
        raise TrialError(f"{what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why, in one line: the text of an error that was written for users, else its type and its text's first line."""
    if isinstance(error, ValueError | OSError | ImportError) and str(error):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: Exception) -> str:
    """Of its text."""
    return str(error).strip().partition("\n")[0]
