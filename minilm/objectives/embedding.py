"""The sentence embedding: the student's vector of a sentence learns the teacher's (Reimers and Gurevych, 2020).

    cosine   1 - cos(P s, t)        mse   the mean over the numbers of (P s - t)²
s is the student's vector, as its folder will make it, and t the teacher's, as its sentence-transformers files make it.
P is learnt, and there only where the two have different widths.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from minilm.errors import UsageError
from minilm.models.batches import Batch
from minilm.models.embeddings import MEAN, SentenceFiles, sequences_present
from minilm.models.observe import Needs, Observed
from minilm.models.probes import is_causal
from minilm.models.sentence_modules import Dense, Normalize, SentenceHead, read_head, write_head
from minilm.models.students import observe_probe
from minilm.objectives.term import Objective, Term, Unit, inside

EmbeddingLoss = Literal["cosine", "mse"]


class SentenceEmbedding(Term):
    """The distance of both models' vectors of a sentence.

    Args:
        teacher_head: a constant.
        student_head: trained, and saved with the student; None: the teacher's, which the student keeps as it is.
        projection: from the student's vectors to the teacher's, trained, and not saved with the student.
        loss: "cosine" or "mse".
        weight: of the part "embedding".
        width: the student's hidden size.
        files: the teacher's, whose prompts and length the student keeps.
        causal: whether the models are decoders.
    """

    unit: Unit = "sequences"
    teacher = student = Needs(final=True)

    def __init__(
        self,
        teacher_head: SentenceHead,
        student_head: SentenceHead | None = None,
        projection: nn.Module | None = None,
        *,
        loss: EmbeddingLoss = "cosine",
        weight: float = 1.0,
        width: int,
        files: SentenceFiles | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        # In a tuple it is no part of the term's state: neither trained, nor in checkpoints, nor in shards.
        self._teacher_head = (teacher_head.requires_grad_(False),)
        self.own_head, self.projection = student_head, projection
        self.loss, self.parts, self.causal = loss, {"embedding": weight}, causal
        self._width, self._files = width, files

    @property
    def teacher_head(self) -> SentenceHead:
        """Makes the teacher's vectors."""
        return self._teacher_head[0]

    @property
    def student_head(self) -> SentenceHead:
        """Makes the student's vectors."""
        return self.teacher_head if self.own_head is None else self.own_head

    @property
    def identity(self) -> dict[str, Any]:
        head = self.teacher_head
        modules = [type(module).__name__ for module in head.further.modules()]
        return {"sentence_pooling": list(head.pooling), "sentence_modules": modules[1:]}

    def forward(self, teacher: Observed, student: Observed, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        assert teacher.final is not None
        assert student.final is not None
        self.teacher_head.to(student.final.device)
        target = self.teacher_head(teacher.final.detach(), batch)
        vectors = self.student_head(student.final, batch)
        with torch.autocast(vectors.device.type, enabled=False):
            if self.projection is not None:
                vectors = self.projection(vectors)
            if self.loss == "cosine":  # as half the squared distance of unit vectors it does not cancel near 0
                u, v = functional.normalize(vectors, dim=1), functional.normalize(target, dim=1)
                rows = (u - v).square().sum(1) / 2
            else:
                rows = (vectors - target).square().mean(1)
        present = sequences_present(batch)
        mean = rows.mean() if present is None else (rows * present).sum() / present.sum().clamp(min=1)
        return self.parts["embedding"] * mean, {"embedding": mean.detach()}

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Makes of the student's folder one that `SentenceTransformer` loads."""
        head = self.student_head
        if self.own_head is None:
            of_head: Mapping[str, Tensor] = head.state_dict()
        else:
            of_head = inside("own_head.", state)
        write_head(folder, head, self._width, of_head, self._files)


def sentence_embedding(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    files: SentenceFiles | None = None,
    *,
    pooling: str | None = None,
    student_embedding_dim: int | None = None,
    loss: EmbeddingLoss = "cosine",
    weight: float = 1.0,
    own_files: SentenceFiles | None = None,
) -> SentenceEmbedding:
    """The term for two models.

    Where both pool to the same width, the student keeps the teacher's further modules as they are. Else it gets a dense
    layer to the teacher's vectors, so that its own lie in the teacher's space. It starts as an orthogonal matrix, which
    keeps the cosines that the student starts with.

    Args:
        files: the teacher's sentence-transformers files; None: its vectors are its pooled hidden states.
        pooling: of both, instead of that in the files, and of the mean without files.
        student_embedding_dim: the numbers in the student's vectors instead: with its own width no dense layer is saved.
            Where the teacher's have another number, a projection to them is learnt.
        own_files: the student's own, where it goes on from a folder: its dense layer does too, if it has the sizes.

    Raises:
        ValueError: models that do not read text; modules of the teacher that are not known here, or do not fit.
    """
    if teacher.main_input_name != "input_ids":
        raise UsageError(f"the embedding is of sentences, and {type(teacher).__name__} takes {teacher.main_input_name}")
    names = (pooling,) if pooling else files.pooling if files else MEAN
    teacher_head = SentenceHead(names, read_head(files).further if files else ())
    hidden, width = _hidden_size(teacher), _hidden_size(student)
    target = _vector_size(teacher_head, hidden)
    ends = [module for module in list(teacher_head.further)[-1:] if isinstance(module, Normalize)]
    own, pooled = None, width * len(names)
    vector = student_embedding_dim or target
    if vector != target or width != hidden:
        own = SentenceHead(names, [*([] if vector == pooled else [_orthogonal(pooled, vector)]), *ends])
        saved = read_head(own_files) if own_files else None
        if saved and saved.pooling == own.pooling and _sizes(saved) == _sizes(own):
            own.load_state_dict(saved.state_dict())
    projection = None if vector == target else nn.Sequential(_orthogonal(vector, target, bias=False), *ends)
    return SentenceEmbedding(
        teacher_head,
        own,
        projection,
        loss=loss,
        weight=weight,
        width=width,
        files=files,
        causal=is_causal(teacher),
    )


def _sizes(head: SentenceHead) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in head.state_dict().items()}


def embedding_of(objective: Objective) -> SentenceEmbedding | None:
    """The term, where the objective has it."""
    return next((term for term in objective if isinstance(term, SentenceEmbedding)), None)


def _hidden_size(model: PreTrainedModel) -> int:
    final = observe_probe(model, Needs(final=True)).final
    assert final is not None
    return final.shape[-1]


def _vector_size(head: SentenceHead, hidden: int) -> int:
    size = hidden * len(head.pooling)
    for module in head.further:
        if isinstance(module, Dense):
            if module.in_features != size:
                raise UsageError(
                    f"the teacher's dense layer takes vectors of {module.in_features} numbers, and "
                    f"{' and '.join(head.pooling)} pooling makes {size}: leave out --pooling"
                )
            size = module.out_features
    return size


def _orthogonal(in_features: int, out_features: int, bias: bool = True) -> Dense:
    dense = Dense(in_features, out_features, bias)
    nn.init.orthogonal_(dense.weight)
    if bias:
        nn.init.zeros_(dense.bias)
    return dense
