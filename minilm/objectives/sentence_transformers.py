"""Relations as a loss of Sentence Transformers: for its Trainer and its training loops, alone or beside other losses.

B batch, N tokens.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minilm.errors import UsageError
from minilm.models.batches import Batch, as_packed, count_sequences, model_inputs
from minilm.models.capture import QKV, capture
from minilm.models.observe import Observed, observe
from minilm.models.probes import embedding_rows, evaluating
from minilm.models.teachers import resolve_length
from minilm.objectives.systems import minilm
from minilm.objectives.term import Objective
from minilm_kernels._checks import relation_weights

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

_TRIAL = "Déjà vu: 42 naïve Tests are un-affable in 日本 & elsewhere."
_HALVES = (torch.bfloat16, torch.float16)


class RelationLoss(nn.Module):
    """The relation loss between the last layers of two models, in each column of a data set; labels are not read.

    The loss is the mean over the sequences of all columns. The Trainer averages the means of accumulated
    batches and of ranks, as it does with every loss: sequences of a smaller batch count more.

    The student's forward ends at its last layer's projections: what stands above them gets no gradient, and is trained
    where another loss is added. Under DDP the Trainer's default of `find_unused_parameters` allows for that; in a sum
    this loss then comes first.

    Args:
        model: the student.
        teacher: of the same tokenizer. Its parameters are frozen, and it runs in eval mode.
        relations: names or weights by name, as in `fused_minilm_loss`: MiniLM by default.
        relation_heads: into how many the heads are split anew (MiniLMv2); None: the heads of the models.
        teacher_layer: whose relations are learnt, 1 to L or -1 to -L.

    Raises:
        ValueError: another tokenizer; fewer positions in the teacher than `model.max_seq_length`; heads or layers that
            do not fit; a model that is not a Transformer of transformers.

    >>> loss = RelationLoss(student, teacher, relations=("qq", "kk", "vv"), relation_heads=48)  # doctest: +SKIP
    >>> SentenceTransformerTrainer(student, train_dataset=dataset, loss=loss).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: "SentenceTransformer",
        teacher: "SentenceTransformer | PreTrainedModel",
        relations: Sequence[str] | Mapping[str, float] = ("qk", "vv"),
        relation_heads: int | None = None,
        teacher_layer: int = -1,
    ) -> None:
        super().__init__()
        student = _transformer(model, "student")
        of_teacher = _transformer(teacher, "teacher")
        _check_tokens(model, teacher, of_teacher)
        terms = minilm(
            of_teacher,
            student,
            relations=relation_weights(relations),
            relation_heads=relation_heads,
            teacher_layer=teacher_layer,
        )
        with torch.no_grad():
            Objective(terms).probe(of_teacher, student)
        self.model = model
        self.teacher = teacher.requires_grad_(False)
        self.term = terms[0]
        self.teacher_layer = teacher_layer

    def forward(self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None) -> Tensor:
        """A float32 scalar.

        Args:
            sentence_features: of each column what its texts were made, as `model.tokenize` does it.
        """
        losses, counts = [], []
        for features in sentence_features:
            batch = as_packed({name: value for name, value in features.items() if isinstance(value, Tensor)})
            student = Observed(self._run_student(features), {})
            loss, _ = self.term(self._run_teacher(batch, student), student, batch)
            losses.append(loss)
            counts.append(count_sequences(batch))
        count = torch.stack(counts)
        return (torch.stack(losses) * count).sum() / count.sum().clamp(min=1)

    def get_config_dict(self) -> dict[str, Any]:
        """What the model card tells of the loss."""
        return {"teacher": self.teacher, **self.term.identity, "teacher_layer": self.teacher_layer}

    @property
    def citation(self) -> str:
        return _CITATION

    def _run_student(self, features: dict[str, Any]) -> dict[int, QKV]:
        """The model's own forward, through DDP where the Trainer has wrapped it, which must see what the loss uses."""
        if isinstance(self.model, nn.DataParallel):
            raise UsageError(
                f"the model was replicated in one process on {len(self.model.device_ids)} devices (DataParallel), "
                "which hands out no q, k, v: start one process for each device with torchrun"
            )
        inner = _unwrapped(self.model)
        with _ending_at_relations(inner, self.term.student.qkv):
            return cast(dict[int, QKV], self.model(features))

    def _run_teacher(self, batch: Batch, student: Observed) -> Observed:
        """In the dtype that the student was run in."""
        teacher = _transformer(self.teacher, "teacher")
        taken = inspect.signature(teacher.forward).parameters
        inputs = {name: x for name, x in model_inputs(teacher, batch, self.term.causal).items() if name in taken}
        q = next(iter(student.qkv.values()))[0]
        with torch.no_grad(), evaluating(teacher), torch.autocast(q.device.type, q.dtype, enabled=q.dtype in _HALVES):
            return observe(teacher, inputs, self.term.teacher)


@contextmanager
def _ending_at_relations(model: nn.Module, layers: tuple[int, ...]) -> Iterator[None]:
    """While entered, a call of the model gives q, k, v of the layers, and runs no further than to these."""
    forward: Callable[..., Any] = model.forward
    own = model.__dict__.get("forward")  # as accelerate sets it, for mixed precision

    def ending(*args: Any, **kwargs: Any) -> dict[int, QKV]:
        with capture(_transformer(model, "student"), layers, stop=True) as captured:
            forward(*args, **kwargs)
        return captured

    model.forward = ending
    try:
        yield
    finally:
        if own is None:
            del model.forward
        else:
            model.forward = own


def _unwrapped(model: nn.Module) -> nn.Module:
    """The SentenceTransformer within DDP or a compiled module."""
    while inner := getattr(model, "_orig_mod", None) or getattr(model, "module", None):
        model = inner
    return model


def _transformer(model: Any, whose: str) -> PreTrainedModel:
    if whose == "teacher" and isinstance(model, PreTrainedModel):
        return model
    first = model[0] if isinstance(model, nn.Sequential) else model
    found = getattr(first, "auto_model", None)
    if not isinstance(found, PreTrainedModel):
        raise UsageError(
            f"the {whose} begins with a {type(first).__name__}, which has no attention: relations are those of a "
            "SentenceTransformer whose first module is a Transformer"
        )
    return found


def _check_tokens(model: "SentenceTransformer", teacher: Any, of_teacher: PreTrainedModel) -> None:
    """The teacher is given the student's tokens."""
    tokenizer: PreTrainedTokenizerBase = model.tokenizer
    rows = embedding_rows(of_teacher)
    if len(tokenizer) > rows:
        raise UsageError(f"the student's tokenizer has {len(tokenizer)} tokens, the teacher embeds {rows}: {_SAME}")
    resolve_length(of_teacher, tokenizer, model.max_seq_length)
    other: PreTrainedTokenizerBase | None = getattr(teacher, "tokenizer", None)
    if other is None:
        return
    read: list[tuple[str, Any, Any]] = [(_TRIAL, tokenizer(_TRIAL)["input_ids"], other(_TRIAL)["input_ids"])]
    own, others = tokenizer.get_vocab(), other.get_vocab()
    if own != others:
        read += [(token, own.get(token), others.get(token)) for token in sorted({*own, *others})]
    for text, by_student, by_teacher in read:
        if by_student != by_teacher:
            raise UsageError(
                f"the student's tokenizer reads {text!r} as {by_student}, the teacher's as {by_teacher}: {_SAME}"
            )


_SAME = "relations are compared token by token, so both models must have the same tokenizer"
_CITATION = """
@inproceedings{wang2020minilm,
    title={MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers},
    author={Wang, Wenhui and Wei, Furu and Dong, Li and Bao, Hangbo and Yang, Nan and Zhou, Ming},
    booktitle={Advances in Neural Information Processing Systems},
    year={2020},
    eprint={2002.10957},
    archivePrefix={arXiv}
}
@inproceedings{wang2021minilmv2,
    title={MiniLMv2: Multi-Head Self-Attention Relation Distillation for Compressing Pretrained Transformers},
    author={Wang, Wenhui and Bao, Hangbo and Huang, Shaohan and Dong, Li and Wei, Furu},
    booktitle={Findings of the Association for Computational Linguistics: ACL 2021},
    year={2021},
    eprint={2012.15828},
    archivePrefix={arXiv}
}
"""
