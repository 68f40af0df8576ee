"""`minilm-train`: distil a Transformer with one command; with no teacher and no data, the embedded demonstration."""

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from minilm.cli.terminal import Terminated, fail, not_installed, patient_streams, sigterm_raises

PROGRAM = "minilm-train"
NEEDED = ("transformers", "datasets", "accelerate", "matplotlib")
CONTINUE = "--resume_from_checkpoint auto continues from the last checkpoint"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's) and returns its exit code.

    0: done. 1: it cannot be done here (a package that is not installed, an output folder with another run, a full
    disk, a loss that is no number any more), or losses of --check lie outside the band. 2: a wrong flag or value. 130
    and 143: stopped by Ctrl-C or SIGTERM. Each but the first says why in one line. What cannot be printed, because
    nobody reads any more, is no error.
    """
    with patient_streams():
        try:
            with sigterm_raises():
                return _run(argv)
        except KeyboardInterrupt:
            return fail(PROGRAM, f"interrupted; {CONTINUE}, if there is one", 128 + signal.SIGINT)
        except Terminated:
            return fail(PROGRAM, f"stopped by SIGTERM; {CONTINUE}, if there is one", 128 + signal.SIGTERM)


def _run(argv: Sequence[str] | None) -> int:
    if missing := not_installed(NEEDED):
        return fail(PROGRAM, missing, 1)
    # Here and not above: they take seconds, and the line before must work without them.
    from minilm.cli.arguments import parse

    arguments = parse(argv)
    # These take longer still, for which help and wrong flags need not wait.
    from minilm.cli.check import check
    from minilm.cli.distill import dry_run, prepare, train
    from minilm.cli.report import overview
    from minilm.cli.stages import stages
    from minilm.data.faults import DataError
    from minilm.errors import NonFiniteError
    from minilm.training.checkpoints import CheckpointError
    from minilm.training.ranks import RankError

    main_process = arguments.training.should_save
    try:
        with _refusals():
            if arguments.run.check:
                told, as_it_should_be = check(arguments)
                print(told)
                return 0 if as_it_should_be else 1
            todo = stages(arguments)
            if arguments.run.dry_run:
                told = dry_run(*todo)
                if main_process:
                    print(told)
                return 0
            run = prepare(*todo)
        if arguments.demo and main_process:
            print("Neither --teacher nor --data: this is the demonstration. For your own, see minilm-train --help.\n")
        for next_run in [*todo[1:], None]:
            if main_process:
                print(overview(run.metrics), flush=True)
            report = train(run)
            if stopped := run.trainer.stopped_by:
                return fail(
                    PROGRAM, f"stopped by {stopped.name} after a checkpoint was saved; {CONTINUE}", 128 + stopped
                )
            if report:
                print(f"\n{report}")
            if next_run:
                with _refusals():
                    run = prepare(next_run)
        run.trainer.end()
    except _RefusedError as error:
        return fail(PROGRAM, str(error), error.code)
    except (CheckpointError, DataError, NonFiniteError, RankError) as error:
        return fail(PROGRAM, str(error), 1)
    return 0


class _RefusedError(Exception):
    """What is asked for cannot be had, in one sentence."""

    def __init__(self, sentence: str, code: int) -> None:
        super().__init__(sentence)
        self.code = code


@contextmanager
def _refusals() -> Iterator[None]:
    """Around what checks and builds, where errors of the system and data that cannot be read are the user's too."""
    from minilm.errors import UsageError
    from minilm.training.runs import OccupiedError

    try:
        yield
    except (OccupiedError, ModuleNotFoundError, OSError) as error:
        raise _RefusedError(str(error), 1) from error
    except UsageError as error:
        raise _RefusedError(str(error), 2) from error
