"""One run of `minilm-train`, from its arguments to its report."""

import itertools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import AutoModel, DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import logging

from minilm._capture import QKV, attention_qkv, num_layers
from minilm.arguments import Arguments
from minilm.data import load_texts, split_heldout, tokenize
from minilm.demo import TEACHER_NAME, docstrings, teacher_folder
from minilm.objectives import build_objective, is_causal, parse_relations
from minilm.report import Metrics, write_report
from minilm.runs import starting_point
from minilm.speed import measure_speed
from minilm.students import build_student, count_parameters
from minilm.teachers import load_teacher, resolve_length
from minilm.trainer import DistillationTrainer

SPEED_BATCHES, SPEED_SECONDS = 8, 3.0


@dataclass
class Run:
    """Everything checked and built; nothing trained yet."""

    trainer: DistillationTrainer
    checkpoint: Path | None  # to continue from
    metrics: Metrics  # what is known before training


def prepare(arguments: Arguments) -> Run:
    """Loads and builds all that a run needs, so that mistakes show before work starts.

    Raises:
        ValueError: one sentence on what the arguments ask for and cannot have.
        OccupiedError: the output folder holds another run.
        ModuleNotFoundError, FileNotFoundError: the demonstration's teacher or text is not installed.
    """
    model, data, objective, training = arguments.model, arguments.data, arguments.objective, arguments.training
    output = Path(str(training.output_dir))
    checkpoint = starting_point(output, training.resume_from_checkpoint)
    relations = parse_relations(objective.relations) if objective.relations else None

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # of weights; the Trainer's own stays
    teacher, tokenizer = load_teacher(str(teacher_folder() if arguments.demo else model.teacher))
    max_length = resolve_length(teacher, tokenizer, data.max_length)
    student = build_student(
        teacher,
        num_layers=model.student_num_layers,
        hidden_size=model.student_hidden_size,
        num_heads=model.student_num_heads,
        intermediate_size=model.student_intermediate_size,
        init=model.student_init,
        seed=training.seed,
    )
    if checkpoint:
        _check_same_student(student, checkpoint)

    criterion = build_objective(
        objective.objective,
        *_probe(teacher, student, tokenizer, model.teacher_layer, training.device),
        relations=relations,
        relation_heads=objective.relation_heads,
        temperature=objective.relation_temperature,
        causal=is_causal(teacher),
        implementation=None if objective.implementation == "auto" else objective.implementation,
    )

    with training.main_process_first(desc="reading the data"):
        if arguments.demo:
            texts = datasets.Dataset.from_dict({"text": docstrings()})
        else:
            assert data.data is not None
            texts = load_texts(data.data, config=data.data_config, text_column=data.text_column)
        train, heldout = (tokenize(part, tokenizer, max_length) for part in split_heldout(texts))

    training.eval_on_start = True  # the untrained student's losses, for the report
    training.dataloader_pin_memory &= training.device.type != "cpu"  # where it does nothing but warn
    trainer = DistillationTrainer(
        teacher=teacher,
        student=student,
        criterion=criterion,
        args=training,
        teacher_layer=model.teacher_layer,
        train_dataset=train,
        eval_dataset=heldout,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
    )
    teacher_name = TEACHER_NAME if arguments.demo else model.teacher
    metrics = {
        "objective": objective.objective,
        "relations": criterion.relations,
        "relation_heads": criterion.relation_heads,
        "teacher_layer": trainer.teacher_layer,
        "teacher": {"name": teacher_name, **_sizes(teacher)},
        "student": {"name": training.output_dir, **_sizes(student)},
        "parameters": {"teacher": count_parameters(teacher), "student": count_parameters(student)},
        "data": {
            "name": "the standard library's docstrings" if arguments.demo else ", ".join(data.data or []),
            "train_sequences": len(train),
            "heldout_sequences": len(heldout),
            "max_length": max_length,
            "sequences_per_step": training.train_batch_size
            * training.gradient_accumulation_steps
            * training.world_size,
        },
        "steps_before_resuming": _step(checkpoint) if checkpoint else 0,
        "device": torch.cuda.get_device_name(training.device)
        if training.device.type == "cuda"
        else training.device.type,
        "arguments": asdict(model) | asdict(data) | asdict(objective) | training.to_dict(),  # type: ignore[no-untyped-call]
    }
    return Run(trainer, checkpoint, metrics)


def train(run: Run) -> str | None:
    """Trains, saves the student and writes the report; returns it on the process that wrote it, None on the others."""
    trainer, args = run.trainer, run.trainer.args
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=str(run.checkpoint) if run.checkpoint else None)
    seconds = time.perf_counter() - start
    if args.load_best_model_at_end or _evaluations(trainer)[-1]["step"] != trainer.state.global_step:
        trainer.evaluate()
    trainer.save_model()

    first, last = _evaluations(trainer)[0], _evaluations(trainer)[-1]
    batches = list(itertools.islice(trainer.get_eval_dataloader(), SPEED_BATCHES))
    report = None
    if args.should_save:
        # As it was saved, which also shows that it loads; under FSDP the one in memory lies in pieces.
        student = AutoModel.from_pretrained(str(args.output_dir), dtype=trainer.teacher.dtype).to(args.device)
        metrics = run.metrics | {
            "heldout": {
                relation: {"start": first[f"eval_{relation}"], "end": last[f"eval_{relation}"]}
                for relation in trainer.relations
            },
            "steps": trainer.state.global_step,
            "seconds": seconds,
            "speeds": {
                "teacher": measure_speed(trainer.teacher, batches, SPEED_SECONDS),
                "student": measure_speed(student, batches, SPEED_SECONDS),
            },
            "speed_batch": args.per_device_eval_batch_size,
        }
        report = write_report(Path(str(args.output_dir)), metrics, trainer.state.log_history)
    trainer.accelerator.end_training()
    return report


def _evaluations(trainer: DistillationTrainer) -> list[dict[str, Any]]:
    return [row for row in trainer.state.log_history if "eval_loss" in row]


def _probe(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    teacher_layer: int,
    device: torch.device,
) -> tuple[QKV, QKV]:
    """q, k, v of both models for one short text: what shapes they have, and that capture sees them."""
    text = tokenizer("MiniLM", return_tensors="pt")
    inputs = {name: text[name].to(device) for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        return (
            attention_qkv(teacher.to(device), inputs, teacher_layer),  # type: ignore[arg-type]
            attention_qkv(student.to(device), inputs),  # type: ignore[arg-type]
        )


def _sizes(model: PreTrainedModel) -> dict[str, int]:
    config = model.config
    return {"layers": num_layers(model), "hidden_size": config.hidden_size, "heads": config.num_attention_heads}


def _check_same_student(student: PreTrainedModel, checkpoint: Path) -> None:
    saved = type(student.config).from_pretrained(checkpoint)
    for size in ("num_hidden_layers", "hidden_size", "num_attention_heads"):
        have, want = getattr(saved, size), getattr(student.config, size)
        if have != want:
            raise ValueError(f"{checkpoint} holds a student with {size} {have}, the arguments ask for {want}")


def _step(checkpoint: Path) -> int:
    return int(json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["global_step"])
