"""Errors of other libraries, told in one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from minilm.finite import NonFiniteError


class TrialError(ValueError):
    """What was asked for failed when it was tried: one sentence on what it was and why."""


@contextmanager
def tried(what: str, leave: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Around something that arguments ask for: an error becomes a `TrialError` that begins with `what`.

    Args:
        leave: errors that are told well already, beside those of the system and `NonFiniteError`.
    """
    try:
        yield
    except (*leave, OSError, NonFiniteError):
        raise
    except torch.OutOfMemoryError as error:
        raise TrialError(f"{what}: {_first_line(error)}; lower --per_device_train_batch_size") from error
    except Exception as error:
        raise TrialError(f"{what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """Why, in one line: the text of an error that was written for users, else its type and its text's first line."""
    if isinstance(error, ValueError | OSError | ImportError) and str(error):
        return " ".join(str(error).split())
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
