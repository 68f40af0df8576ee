"""`minilm-train`: distil a Transformer with one command; with no teacher and no data, the embedded demonstration."""

import sys
from collections.abc import Sequence
from importlib.util import find_spec

NEEDED = ("transformers", "datasets", "accelerate", "matplotlib")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's) and returns its exit code.

    0: done. 1: it cannot be done here (a package that is not installed, an output folder with another run).
    2: a wrong flag or value. 130: interrupted. Each but the first says why in one line.
    """
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        return _fail(f"{', '.join(missing)} not installed: pip install 'fused-minilm[train]'", 1)
    # Here and not above: they take seconds, and the line before must work without them.
    from minilm.arguments import parse
    from minilm.distill import prepare, train
    from minilm.report import overview
    from minilm.runs import OccupiedError

    arguments = parse(argv)
    try:
        run = prepare(arguments)
    except (OccupiedError, ModuleNotFoundError, FileNotFoundError) as error:
        return _fail(str(error), 1)
    except ValueError as error:
        return _fail(str(error), 2)
    if arguments.training.should_save:
        if arguments.demo:
            print("Neither --teacher nor --data: this is the demonstration. For your own, see minilm-train --help.\n")
        print(overview(run.metrics), flush=True)
    try:
        report = train(run)
    except KeyboardInterrupt:
        return _fail("interrupted; --resume_from_checkpoint auto continues after the last checkpoint, if any", 130)
    if report:
        print(f"\n{report}")
    return 0


def _fail(message: str, code: int) -> int:
    print(f"minilm-train: error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":  # torchrun --nproc_per_node N -m minilm.cli
    sys.exit(main())
