"""Calls in processes of their own, forked from one that has imported PyTorch and transformers."""

import multiprocessing
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

SECONDS = 240
IMPORTED = ["minilm.cli.distill", "minilm.training.trainer"]


def side_by_side(*calls: Callable[[], Any]) -> list[Any]:
    """What each call, of a function that another process can import, gives; all run at once.

    Raises:
        RuntimeError: with the traceback of a call that raised.
        EOFError: a process died.
        TimeoutError: a call took longer than `SECONDS`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    pipes = [context.Pipe(duplex=False) for _ in calls]
    processes = [
        context.Process(target=_answer, args=(sender, call)) for (_, sender), call in zip(pipes, calls, strict=True)
    ]
    try:
        for process, (_, sender) in zip(processes, pipes, strict=True):
            process.start()
            sender.close()  # or a process that dies would not end what the parent reads
        return [_received(receiver) for receiver, _ in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answer(sender: Connection, call: Callable[[], Any]) -> None:
    try:
        sender.send((call(), None))
    except BaseException:
        sender.send((None, traceback.format_exc()))


def _received(receiver: Connection) -> Any:
    if not receiver.poll(SECONDS):
        raise TimeoutError(f"no answer within {SECONDS} s")
    result, failure = receiver.recv()
    if failure:
        raise RuntimeError(failure)
    return result
