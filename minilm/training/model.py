"""The student with its loss inside, as DDP, FSDP and mixed precision see it."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.errors import UsageError
from minilm.models.batches import by_token, model_inputs
from minilm.models.observe import Observed, observe
from minilm.objectives.loss import MiniLMLoss
from minilm.objectives.relations import Relations
from minilm.objectives.systems import with_soft_labels
from minilm.objectives.term import Objective, Unit


class DistillationModel(nn.Module):
    """The student with its loss inside.

    Accelerate turns what a model returns into float32, and the Trainer's `compute_loss` runs outside autocast; computed
    in here, the loss gets all tensors in the dtype that the student computes in.

    Args:
        student: a base model; with a term that needs its output the model with its head.
        criterion: the objective, or the relations of the last layers and their weights.
        output_weight: of the output loss L_OUT beside such relations; 0 leaves it out.
        output_temperature: T of the output loss T² KL(teacher logits / T ‖ student logits / T).
    """

    accepts_loss_kwargs = True  # tells the Trainer that the loss it gets is already weighted within the step

    def __init__(
        self,
        student: PreTrainedModel,
        criterion: MiniLMLoss | Objective,
        output_weight: float = 0.0,
        output_temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.student = student
        self.objective = as_objective(criterion, student, -1, output_weight, output_temperature)

    def forward(
        self, teacher: Observed, shares: Mapping[Unit, Tensor] | None = None, **batch: Tensor
    ) -> dict[str, Tensor]:
        """{"loss", part: its mean over the batch}, float32 scalars; the parts are detached.

        Args:
            teacher: what `observe` gave of the teacher for the objective's needs.
            shares: how much of its step the batch is, by unit; None: all of it.
            batch: the student's inputs, with attention_mask (B, N) where there is padding, or a packed batch.
        """
        inputs = model_inputs(self.student, batch, self.objective.causal)
        student = observe(self.student, inputs, self.objective.student)
        of_tokens = by_token(self.student, batch, student.tokens)
        outputs: dict[str, Tensor] = self.objective(teacher, student, of_tokens, shares)
        return outputs

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """Recompute the student's layers in backward, non-reentrant: the other kind gives q, k, v no gradient."""
        kwargs = {"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}
        self.student.gradient_checkpointing_enable(  # type: ignore[no-untyped-call]
            gradient_checkpointing_kwargs=kwargs, **options
        )

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        """`gradient_checkpointing_enable` under the name that newer Trainers call."""
        kwargs = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        self.student.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs, **options)


def as_objective(
    criterion: MiniLMLoss | Objective,
    student: PreTrainedModel,
    teacher_layer: int = -1,
    output_weight: float = 0.0,
    output_temperature: float = 1.0,
) -> Objective:
    """An objective as it is, or that of relations between the student's last layer and one of the teacher's.

    Raises `ValueError` for an objective beside options that only relations have.
    """
    if not isinstance(criterion, Objective):
        relations = Relations(criterion, {-1: teacher_layer})
        return with_soft_labels([relations], student, output_weight, output_temperature)
    if (teacher_layer, output_weight, output_temperature) != (-1, 0.0, 1.0):
        raise UsageError(
            f"the criterion is an Objective, whose terms say what teacher_layer={teacher_layer}, output_weight="
            f"{output_weight} and output_temperature={output_temperature} would: leave these out"
        )
    return criterion
