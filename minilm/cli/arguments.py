"""The flags of `minilm-train`: its own, and all of `transformers.TrainingArguments`."""

import difflib
import sys
from argparse import ArgumentDefaultsHelpFormatter, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NoReturn

from transformers import HfArgumentParser, TrainingArguments

from minilm.cli import recipes
from minilm.cli.checks import MODES, find_data_flag, find_meaningless, find_missing
from minilm.cli.demo import OUTPUT_DIR
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


def _about(help: str, metavar: str | None = None) -> dict[str, str]:
    return {"help": help} if metavar is None else {"help": help, "metavar": metavar}


@dataclass
class ModelArguments:
    """Which teacher, and what student."""

    _argument_group_name = "teacher and student"

    teacher: str | None = field(
        default=None, metadata=_about("Model to distil: a name on the hub or a folder.", "NAME|DIR")
    )
    teacher_layer: int = field(
        default=-1,
        metadata=_about("Teacher layer whose relations are learnt: 1 to L from the bottom, or -1 to -L.", "L"),
    )
    student_num_layers: int | None = field(
        default=None, metadata=_about("Layers of the student (default: the teacher's).", "M")
    )
    student_hidden_size: int | None = field(
        default=None, metadata=_about("Hidden size of the student (default: the teacher's).", "H")
    )
    student_num_heads: int | None = field(
        default=None, metadata=_about("Attention heads of the student (default: the teacher's).", "A")
    )
    student_intermediate_size: int | None = field(
        default=None,
        metadata=_about("Feed-forward size (default: in the teacher's ratio to the hidden size).", "F"),
    )
    student_init: Literal["auto", "random", "layers", "slice", "pca"] = field(
        default="auto",
        metadata=_about(
            "Weights to start from. layers: the teacher's, evenly and the last layer included; slice: these, cut to "
            "the student's sizes; pca: the teacher's embeddings on their leading principal components, the rest "
            "random; random; auto: layers where the sizes match, else random."
        ),
    )
    assistant_num_layers: int | None = field(
        default=None,
        metadata=_about(
            "Layers of a teacher assistant (MiniLM, section 3.4), which learns from the teacher first and teaches the "
            "student then. It stays in OUTPUT_DIR/assistant.",
            "M",
        ),
    )
    assistant_hidden_size: int | None = field(
        default=None, metadata=_about("Hidden size of the assistant (default: the teacher's).", "H")
    )


@dataclass
class DataArguments:
    """Which text, or which images."""

    _argument_group_name = "data"

    data: list[str] | None = field(
        default=None,
        metadata=_about(
            "Text to distil on: .txt (a text a line), .csv, .json, .jsonl, .arrow or .parquet files, folders of one "
            "kind of them (of which the training split is read), or names of data sets on the hub. For a vision "
            "teacher folders or .parquet files of images. One text in twenty, at most 512, is held out.",
            "NAME|FILE|DIR",
        ),
    )
    data_weights: list[float] | None = field(
        default=None,
        metadata=_about("How often each of the data is drawn from, relative to the others (default: as it is).", "W"),
    )
    data_config: str | None = field(
        default=None, metadata=_about("Configuration of the data sets from the hub.", "CONFIG")
    )
    text_column: str = field(default="text", metadata=_about("Column with the text; .txt files need none.", "COLUMN"))
    image_column: str = field(default="image", metadata=_about("Column with the image.", "COLUMN"))
    streaming: bool = field(
        default=False,
        metadata=_about("Read the data as they come, without indexing them first; needs --max_steps."),
    )
    shuffle_buffer: int = field(
        default=10_000, metadata=_about("With --streaming: texts that are shuffled among each other.", "TEXTS")
    )
    packing: bool = field(
        default=False,
        metadata=_about("Put several texts into a row of --max_length tokens; they do not see each other."),
    )
    max_length: int | None = field(
        default=None,
        metadata=_about("Tokens at which a text is cut off (default: 512, or the teacher's positions if fewer).", "N"),
    )


@dataclass
class ObjectiveArguments:
    """What is learnt."""

    _argument_group_name = "objective"

    objective: Literal["minilm", "minilm-v2"] = field(
        default="minilm",
        metadata=_about("minilm: relations QK and VV; minilm-v2: QQ, KK and VV over relation heads."),
    )
    relations: str | None = field(
        default=None,
        metadata=_about("Other relations than the objective's, with weights: qk,vv or qk:1,vv:0.5.", "PAIRS"),
    )
    relation_heads: int | None = field(
        default=None,
        metadata=_about(
            "Heads that queries, keys and values are split into for the relations (default: for minilm the models' "
            "own, for minilm-v2 four to each of the teacher's, or the teacher's where the widths do not divide).",
            "R",
        ),
    )
    output_weight: float = field(
        default=0.0,
        metadata=_about(
            "Weight of the output loss beside the relations: KL between the logits of masked-LM, causal-LM or "
            "classification heads, which both models then have.",
            "W",
        ),
    )
    output_temperature: float = field(
        default=1.0, metadata=_about("Divides the logits of both models in the output loss.", "T")
    )
    relation_temperature: float = field(default=1.0, metadata=_about("Divides the scores of both models.", "T"))
    implementation: Literal["auto", "triton", "chunked", "reference"] = field(
        default="auto",
        metadata=_about("How the loss is computed; auto is triton on a CUDA device and chunked elsewhere."),
    )


@dataclass
class RunArguments:
    """How the run goes."""

    _argument_group_name = "run"

    recipe: str | None = field(
        default=None, metadata=_about("Take the flags of a recipe or file; all others override them.", "NAME|FILE")
    )
    list_recipes: bool = field(default=False, metadata=_about("List the recipes and stop."))
    dry_run: bool = field(
        default=False,
        metadata=_about("Build everything, take three steps, print parameters, memory and time, write nothing."),
    )


class TrainerArguments(TrainingArguments):
    """`TrainingArguments` under a heading of their own."""

    _argument_group_name = "training (transformers.TrainingArguments)"

    def __post_init__(self) -> None:
        # Every metric is a loss here, whether its name ends in "loss" or not.
        self.greater_is_better = bool(self.greater_is_better)
        super().__post_init__()  # type: ignore[no-untyped-call]


@dataclass
class Arguments:
    """What the command line said."""

    model: ModelArguments
    data: DataArguments
    objective: ObjectiveArguments
    run: RunArguments
    training: TrainingArguments
    demo: bool  # neither --teacher nor --data: the embedded demonstration
    in_assistant_chain: bool = False  # a run of a teacher, an assistant and a student: either of its halves


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
    given, _ = parser.parse_known_args(argv, Namespace(**dict.fromkeys(MODES)))
    if given.list_recipes:
        print(recipes.listing())
        parser.exit()
    if problem := find_meaningless(given, parser, groups):
        parser.error(problem)
    demo = given.teacher is None and given.data is None
    if demo:
        parser.set_defaults(**DEMO)
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            argv, return_remaining_strings=True, look_for_args_file=False
        )
    except Exception as error:  # of TrainingArguments, which check themselves and build what some flags ask for
        parser.error(reason(error))
    if unknown:
        parser.error(_unknown(unknown, parser))
    if problem := find_data_flag(given) if demo else find_missing(given):
        parser.error(problem)
    model, data, objective, run, training = parsed
    return Arguments(model, data, objective, run, training, demo)


def _is_unicode(argument: str) -> bool:
    try:
        argument.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unknown(unknown: list[str], parser: HfArgumentParser) -> str:
    flag = unknown[0].partition("=")[0]
    near = difflib.get_close_matches(flag, parser._option_string_actions, n=1)
    return f"unknown argument {unknown[0]}" + (f", did you mean {near[0]}?" if near else "")


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line; argparse would print the usage of all flags first."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


class _HelpFormatter(RawDescriptionHelpFormatter, ArgumentDefaultsHelpFormatter):
    """The description as it stands, and defaults where there are any."""

    def _get_help_string(self, action: Any) -> str | None:
        return action.help if action.default is None else super()._get_help_string(action)
