"""The command line of `minilm-train`: its own flags, and all of `transformers.TrainingArguments`."""

import difflib
import sys
from argparse import ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from minilm.cli import recipes
from minilm.cli.checks import MODES, find_beside_check, find_data_flag, find_meaningless, find_missing
from minilm.cli.demo import OUTPUT_DIR
from minilm.cli.flags import DataArguments, ModelArguments, ObjectiveArguments, RunArguments, TrainerArguments
from minilm.cli.terminal import OneLineErrors
from minilm.errors import reason

DESCRIPTION = """\
Distil a Transformer into a small one by its self-attention relations (MiniLM).

  minilm-train                                      a demonstration: a real teacher, real text, minutes on a CPU
  minilm-train --teacher bert-base-uncased --data my_texts/ --student_num_layers 6 --output_dir small-bert
  minilm-train --recipe minilm-v2-l6-h384 --output_dir minilm-v2     the papers' settings; --list_recipes names all
"""

# Where the papers' choices (MiniLM and MiniLMv2, section 4.1) differ from the Trainer's defaults.
DEFAULTS: dict[str, Any] = {
    "learning_rate": 5e-4,
    "weight_decay": 0.01,
    "warmup_steps": 0.05,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 32,
    "logging_steps": 50,
    "save_total_limit": 2,  # 0 keeps all
    "train_sampling_strategy": "group_by_length",
}
DEMO: dict[str, Any] = {
    "student_num_layers": 3,
    "student_init": "layers",
    "max_length": 64,
    "output_dir": OUTPUT_DIR,
    "max_steps": 300,
    "learning_rate": 2e-4,
    "warmup_steps": 30,
    "logging_steps": 10,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "save_steps": 100,
    "save_total_limit": 1,
}


@dataclass
class Arguments:
    """What the command line said."""

    model: ModelArguments
    data: DataArguments
    objective: ObjectiveArguments
    run: RunArguments
    training: TrainingArguments
    demo: bool  # neither --teacher nor --data: the embedded demonstration
    in_chain: bool = False  # one of several runs of a command


def own_arguments(arguments: Arguments) -> dict[str, Any]:
    """By name, those that are no `TrainingArguments` and tell what is trained."""
    return asdict(arguments.model) | asdict(arguments.data) | asdict(arguments.objective)


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Arguments of a run; a wrong flag or value ends the process with one line and exit code 2, as argparse does."""
    argv = list(sys.argv[1:] if argv is None else argv)
    groups: list[Any] = [ModelArguments, DataArguments, ObjectiveArguments, RunArguments, TrainerArguments]
    parser = _Parser(
        groups,
        prog="minilm-train",
        usage="minilm-train [--recipe NAME] [--teacher NAME|DIR --data NAME|FILE|DIR ... --output_dir DIR] [flags]",
        description=DESCRIPTION,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(**DEFAULTS)
    try:
        argv = recipes.expand(argv)
    except ValueError as error:
        parser.error(str(error))
    if broken := next((argument for argument in argv if not _is_unicode(argument)), None):
        parser.error(f"the argument {broken!r} is no text in {sys.getfilesystemencoding()}: rename what it names")
    given, unknown = parser.parse_known_args(argv, Namespace(**dict.fromkeys(MODES)))
    if given.list_recipes:
        print(recipes.listing())
        parser.exit()
    if problem := find_meaningless(given, parser, groups):
        parser.error(problem)
    if unknown:
        parser.error(_unknown(unknown, parser))
    if given.check and (problem := find_beside_check(_named(argv, parser))):
        parser.error(problem)
    # Here and not above: it takes seconds, for which help and wrong flags need not wait.
    from minilm.objectives.systems import own_defaults

    parser.set_defaults(**own_defaults(given.objective))
    demo = given.teacher is None and given.data is None
    if demo:
        parser.set_defaults(**DEMO)
    try:
        parsed = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except Exception as error:  # of TrainingArguments, which check themselves and build what some flags ask for
        parser.error(reason(error))
    if problem := find_data_flag(given) if demo else find_missing(given):
        parser.error(problem)
    model, data, objective, run, training = parsed
    return Arguments(model, data, objective, run, training, demo)


def _named(argv: list[str], parser: HfArgumentParser) -> list[str]:
    """The flags that stand in the command line, whatever their values."""
    unset = Namespace(**dict.fromkeys(action.dest for action in parser._actions))
    return [name for name, value in vars(parser.parse_known_args(argv, unset)[0]).items() if value is not None]


def _is_unicode(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in argument  # which a recipe may hold, and no name can


def _unknown(unknown: list[str], parser: HfArgumentParser) -> str:
    flag = unknown[0].partition("=")[0]
    near = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
    return f"unknown argument {unknown[0]}" + (f", did you mean {near[0]}?" if near else "")


class _Parser(OneLineErrors, HfArgumentParser):
    """`HfArgumentParser` with errors of one line."""


class _HelpFormatter(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """The description as it stands, and defaults where there are any."""

    def _get_help_string(self, action: Any) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)
