"""One run of `minilm-train`, from its arguments to its report."""

import itertools
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from minilm.cli.adapt import adapt
from minilm.cli.arguments import Arguments, own_arguments
from minilm.cli.building import check_whole_rows, masking, needs_head, rates, student_and_objective, try_later
from minilm.cli.demo import TEACHER_NAME, teacher_folder
from minilm.cli.identity import run_identity, sizes
from minilm.cli.inputs import Inputs, Processor, load_inputs
from minilm.cli.rehearsal import rehearsal_arguments, rehearse
from minilm.cli.report import Metrics, overview, publish_report
from minilm.cli.serving import serves
from minilm.cli.trial import try_out
from minilm.cli.vocabulary import cut_as_student, cut_both
from minilm.errors import reason, tried
from minilm.models.agreement import FEWEST_TEXTS, Agreement
from minilm.models.batches import check_packable
from minilm.models.embeddings import MEAN, SentenceFiles, sentence_files
from minilm.models.probes import base_of
from minilm.models.sentence_modules import SentenceHead, read_head
from minilm.models.speed import measure_speed
from minilm.models.students import count_parameters
from minilm.models.teachers import auto_class, check_length, quiet, read_teacher
from minilm.models.vocabulary import named_tokens
from minilm.objectives.embedding import embedding_of
from minilm.objectives.term import Objective
from minilm.training.arguments import check_arguments
from minilm.training.checkpoints import CheckpointError
from minilm.training.folders import claimed
from minilm.training.runs import check_resume, check_same_run, starting_point
from minilm.training.trainer import DistillationTrainer

SPEED_BATCHES, SPEED_SECONDS = 8, 3.0
CHECKPOINTED = ("config.json",)  # beside what every checkpoint has


class Models(NamedTuple):
    """The teacher as it was loaded, the student as it starts, and what it learns."""

    name: str  # of the teacher, or its folder
    teacher: PreTrainedModel
    student: PreTrainedModel
    objective: Objective
    processor: Processor
    saved_processor: Any  # as it is saved with the student
    sentences: SentenceFiles | None  # of the teacher
    size: dict[str, int]  # of the teacher as it was loaded, its parameters
    named: set[int]  # tokens of the teacher as it was loaded that it knows by number
    kept: list[int] | None  # tokens to which both were cut before, where the student came so


@dataclass
class Run:
    """Everything checked and built; nothing trained yet."""

    trainer: DistillationTrainer
    checkpoint: Path | None  # to continue from
    metrics: Metrics  # what is known before training
    sentences: SentenceFiles | None  # of the teacher
    claims: ExitStack = field(default_factory=ExitStack)  # on the output folders, given back when it is trained


def prepare(arguments: Arguments, *later: Arguments) -> Run:
    """Loads and builds all that a run needs, so that mistakes show before work starts.

    Args:
        later: the runs after this one, which its student teaches, or in which it goes on; what they train is tried too.

    Raises:
        ValueError: one sentence on what the arguments ask for and cannot have.
        OccupiedError: the output folder holds another run, or something that this one would overwrite; another process
            writes into it; nobody can.
        ModuleNotFoundError, FileNotFoundError: the demonstration's teacher or text is not installed.
    """
    with ExitStack() as claims:
        for stage in (*reversed(later), arguments):
            if stage.training.process_index == 0:
                claims.enter_context(claimed(Path(str(stage.training.output_dir))))
        run = _prepare(arguments, later)
        run.claims = claims.pop_all()
    return run


def _prepare(arguments: Arguments, later: Sequence[Arguments]) -> Run:
    training = arguments.training
    checkpoint = _starting_point(training)
    for stage in later:
        _starting_point(stage.training)
    check_arguments(training)
    models = _build(arguments, later)
    with training.main_process_first(desc="reading the data"):
        inputs = load_inputs(arguments, models.teacher, models.processor, models.named)
    if inputs.description["max_length"]:
        check_length("student", models.student, inputs.description["max_length"])
    if inputs.vocabulary:
        models = _cut(arguments, models, inputs.vocabulary.kept)
    identity = run_identity(arguments, models.objective, models.teacher, models.student, inputs)
    if checkpoint:
        check_same_run(checkpoint, identity)
        check_resume(checkpoint, training)
    adapt(training, inputs, models.teacher, evaluate_untrained=not arguments.run.dry_run)
    trainer = _make_trainer(arguments, models, inputs)
    try_out(trainer)
    trainer.run_identity = identity
    if checkpoint:
        trainer.load_rank_state(checkpoint)  # here, where what does not fit is told before any work
    return Run(trainer, checkpoint, _known(arguments, models, inputs, trainer, checkpoint), models.sentences)


def _starting_point(training: TrainingArguments) -> Path | None:
    return starting_point(Path(str(training.output_dir)), training.resume_from_checkpoint, CHECKPOINTED)


def _build(arguments: Arguments, later: Sequence[Arguments]) -> Models:
    """Loads the teacher, builds the student and the loss, and those of the later runs too."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of weights; the Trainer's own stays
    name = arguments.model.teacher or str(teacher_folder())
    torch.manual_seed(arguments.training.seed)  # for what the weights lack, a pooler: alike when the run is continued
    teacher, processor, saved_processor = read_teacher(name, head=needs_head(arguments))
    is_text = isinstance(processor, PreTrainedTokenizerBase)
    sentences = sentence_files(name) if is_text else None
    size, named = count_parameters(teacher), named_tokens(teacher) if is_text else set()
    kept = cut_as_student(arguments.model, teacher, processor)
    with tried("cannot build the student"):
        student, objective = student_and_objective(arguments, teacher, sentences)
    try_later(later, arguments, teacher, student)
    if arguments.data.packing:
        check_packable(teacher)
        check_packable(student)
        check_whole_rows(teacher, objective)
    return Models(name, teacher, student, objective, processor, saved_processor, sentences, size, named, kept)


def _cut(arguments: Arguments, models: Models, kept: Sequence[int]) -> Models:
    """Both models know the kept tokens alone, so that they read the same text under the same numbers."""
    both, processors = [models.teacher, models.student], [models.processor, models.saved_processor]
    processor, saved = cut_both(arguments.model, both, processors, kept, models.kept)
    return models._replace(processor=processor, saved_processor=saved)


def _make_trainer(arguments: Arguments, models: Models, inputs: Inputs) -> DistillationTrainer:
    training = arguments.training
    with tried("cannot build the trainer"):
        return DistillationTrainer(
            teacher=models.teacher,
            student=models.student,
            criterion=models.objective,
            args=training,
            masking=masking(arguments, models.processor),
            greater_is_better=bool(training.greater_is_better),
            train_dataset=inputs.train,
            eval_dataset=inputs.heldout,
            processing_class=models.saved_processor,
            data_collator=inputs.collator,
            learning_rate_factors=rates(arguments, models.teacher, models.student, models.objective),
        )


def _known(
    arguments: Arguments, models: Models, inputs: Inputs, trainer: DistillationTrainer, checkpoint: Path | None
) -> Metrics:
    """The metrics that are known before training."""
    objective, training = models.objective, arguments.training
    teacher, student, sentences = models.teacher, models.student, models.sentences
    embedding = embedding_of(objective)
    pooling = embedding.teacher_head.pooling if embedding else sentences.pooling if sentences else MEAN
    at_once = training.train_batch_size * training.world_size
    device = training.device
    return {
        "objective": arguments.objective.objective,
        **objective.identity,
        "parts": objective.parts,
        "auto_class": auto_class(student).__name__,
        "learns_the_end": objective.learns_the_end,
        "serves": objective.learns_the_end or (not objective.student.hidden and serves(models.name, trainer)),
        "learns_hidden": bool(objective.student.hidden),
        "pooling": list(pooling),
        "sentence_files": embedding is not None or (sentences is not None and _same_width(teacher, student)),
        "in_chain": arguments.in_chain,
        "processor": "tokenizer" if isinstance(models.processor, PreTrainedTokenizerBase) else "image processor",
        "teacher_layer": trainer.teacher_layer if len(objective.teacher.qkv) == 1 else 0,
        "layer_map": arguments.objective.layer_map,
        "teacher": {"name": arguments.model.teacher or TEACHER_NAME, **sizes(teacher)},
        "student": {"name": training.output_dir, **sizes(student)},
        "parameters": {"teacher": models.size, "student": count_parameters(student)},
        "data": inputs.description | {"sequences_per_step": at_once * training.gradient_accumulation_steps},
        "steps_before_resuming": _step(checkpoint) if checkpoint else 0,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "arguments": own_arguments(arguments) | training.to_dict(),  # type: ignore[no-untyped-call]
    }


def train(run: Run) -> str | None:
    """Trains, saves the student and writes the report; returns it on the process that wrote it, None on the others.

    Stopped by a signal (`run.trainer.stopped_by`), it writes nothing but the checkpoint.
    """
    with run.claims:
        return _train(run)


def _train(run: Run) -> str | None:
    trainer, args = run.trainer, run.trainer.args
    embedding = embedding_of(trainer.terms)
    pooled = SentenceHead(run.metrics["pooling"])
    heads = (embedding.teacher_head, embedding.student_head) if embedding else (pooled, pooled)
    agreement = _agreement(trainer, heads[0]) if args.should_save else None
    untrained = agreement.similarities(base_of(trainer.student), heads[1]) if agreement else None
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    if trainer.stopped_by is not None:
        trainer.end()
        return None
    seconds = time.perf_counter() - start
    if bad := trainer.bad_records():
        run.metrics["data"]["bad_records"] = bad
    # The embedding's term has files of its own, which the trainer writes.
    sentences = run.sentences if run.metrics["sentence_files"] and not embedding else None
    trainer.save_student(sentences.copy_to if sentences else lambda folder: None)
    if args.load_best_model_at_end or _evaluations(trainer)[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    batches = list(itertools.islice(trainer.get_eval_dataloader(), SPEED_BATCHES))
    report = None
    if args.should_save:
        with _report_errors(Path(str(args.output_dir))):
            report = _report(run, agreement, untrained, batches, seconds)
    trainer.accelerator.wait_for_everyone()  # the next run's teacher may be what was written
    if args.push_to_hub:
        trainer.push_to_hub()
    return report


@contextmanager
def _report_errors(output: Path) -> Iterator[None]:
    """What goes wrong once the student is in its place is told with where it is."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(f"the student is saved in {output}, but not its report: {reason(error)}") from error


def _report(run: Run, agreement: Agreement | None, untrained: Any, batches: list[Any], seconds: float) -> str:
    """Measures, writes the report and returns it."""
    trainer, args = run.trainer, run.trainer.args
    output = Path(str(args.output_dir))
    first, last = _evaluations(trainer)[0], _evaluations(trainer)[-1]
    # As it was saved, which also shows that it loads; under FSDP the one in memory lies in pieces.
    with quiet():  # about a head, which the speeds leave out
        student = AutoModel.from_pretrained(str(output), dtype=trainer.teacher.dtype).to(args.device)
    metrics = run.metrics | {
        "heldout": {part: {"start": first[f"eval_{part}"], "end": last[f"eval_{part}"]} for part in trainer.parts},
        "steps": trainer.state.global_step,
        "seconds": seconds,
        "speeds": {
            "teacher": measure_speed(base_of(trainer.teacher), batches, SPEED_SECONDS),
            "student": measure_speed(student, batches, SPEED_SECONDS),
        },
        "training": _pace(trainer),
        "speed_batch": args.per_device_eval_batch_size,
    }
    metrics["agreement"] = None
    if agreement and untrained is not None:
        own = sentence_files(str(output)) if embedding_of(trainer.terms) else None
        head = read_head(own) if own else SentenceHead(metrics["pooling"])
        trained = agreement.similarities(student, head)
        metrics["agreement"] = {
            "texts": len(agreement.rows),
            "neighbours": agreement.neighbours,
            "start": agreement.measure(untrained),
            "end": agreement.measure(trained),
            "examples": agreement.examples(trained, cast(PreTrainedTokenizerBase, trainer.processing_class)),
        }
    return publish_report(output, metrics, trainer.state.log_history)


def dry_run(arguments: Arguments, *later: Arguments) -> str:
    """Builds everything as `prepare` does, takes three steps in a folder that is removed, and tells what they cost."""
    starting_point(Path(str(arguments.training.output_dir)), arguments.training.resume_from_checkpoint)
    check_arguments(arguments.training)  # with the strategies that the rehearsal's have not
    with tempfile.TemporaryDirectory() as folder:
        training = rehearsal_arguments(arguments.training, folder)
        run = prepare(replace(arguments, training=training), *later)
        with run.claims:
            run.metrics["student"]["name"] = arguments.training.output_dir
            return "\n".join([overview(run.metrics), rehearse(run.trainer, arguments.training)])


def _agreement(trainer: DistillationTrainer, head: SentenceHead) -> Agreement | None:
    """Of a text model with texts enough."""
    heldout: Any = trainer.eval_dataset
    collate: Any = trainer.data_collator
    if not isinstance(trainer.processing_class, PreTrainedTokenizerBase) or len(heldout) < FEWEST_TEXTS:
        return None
    return Agreement(base_of(trainer.teacher), heldout, collate, trainer.args.per_device_eval_batch_size, head)


def _same_width(teacher: PreTrainedModel, student: PreTrainedModel) -> bool:
    return bool(teacher.config.hidden_size == student.config.hidden_size)


def _evaluations(trainer: DistillationTrainer) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if "eval_loss" in row]


def _pace(trainer: DistillationTrainer) -> dict[str, float]:
    """Means over the log of what was logged."""
    logged: dict[str, list[float]] = {}
    for row in trainer.state.log_history:
        for name in {"tokens_per_second", "images_per_second"} & row.keys():
            logged.setdefault(name, []).append(row[name])
    return {name: sum(values) / len(values) for name, values in logged.items()}


def _step(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"])
