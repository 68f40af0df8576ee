"""Fine-tuning on questions and the documents that their answers stand in, and scoring as SQuAD does."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, DataCollatorWithPadding

from minilm.evaluation.answer_windows import evaluation_windows, training_windows
from minilm.evaluation.answers import best_answers
from minilm.evaluation.fitting import fit, predict
from minilm.evaluation.settings import Settings
from minilm.evaluation.squad_metrics import squad_scores
from minilm.evaluation.task_data import TaskData
from minilm.evaluation.task_models import load_for_task
from minilm.evaluation.tasks import Scores
from minilm.models.teachers import positions


def finetune_answers(model: str, data: TaskData, settings: Settings, folder: Path) -> Scores:
    """What the model scores after it was fine-tuned to point at the first and last token of the answer.

    If some question of the task has no answer, as in SQuAD 2.0, so does one whose null token scores higher than its
    best span, and the scores are all those of `squad_scores`; else "exact" and "f1" of the best spans. The null token
    of a decoder stands before the context, so that it has one score for a question whatever the context.

    Args:
        data: its columns as `minilm.evaluation.answer_records` has them.
        settings: a window has its `length` tokens, or as many as the model has positions where these are fewer.
        folder: for the Trainer, which leaves nothing in it.

    Raises:
        UsageError: a model that does not load or has no such head; a tokenizer that does not tell where its tokens
            stand in a text.
        NonFiniteError: the loss or the weights became NaN or infinite.
    """
    network, tokenizer = load_for_task(model, AutoModelForQuestionAnswering, 0, settings.seed, num_labels=2)
    tokenizer.truncation_side = "right"
    length = settings.length(data.task.form)
    length = min(length, positions(network) or length)
    trainer = fit(
        network,
        training_windows(data.train, tokenizer, length),
        DataCollatorWithPadding(tokenizer),
        settings,
        folder,
        f"{Path(model).name} on {data.task.name}",
        keep=lambda logits: logits[:2],  # of start and end, without the hidden states of some models
    )
    may_lack_answer = any(_lacks_answer(split) for split in (data.train, *data.evaluated.values()))
    found = {}
    for split, records in data.evaluated.items():
        windows = evaluation_windows(records, tokenizer, length)
        answers = best_answers(windows, records["context"], *predict(trainer, windows))
        golds = [answer["text"] for answer in records["answers"]]
        found[split] = squad_scores(answers.texts, golds, answers.no_answer_scores if may_lack_answer else None)
    return found


def _lacks_answer(records: Dataset) -> bool:
    answers: list[dict[str, Any]] = records["answers"][:]
    return any(not answer["text"] for answer in answers)
