"""What a Trainer saves of its model: the student alone, and in a checkpoint the state of the objective beside it."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.errors import UsageError
from minilm.objectives.term import Objective, inside
from minilm.training.checkpoints import CheckpointingTrainer

OBJECTIVE = "objective.pt"  # in a checkpoint of an objective whose terms have parameters or buffers


class SavingTrainer(CheckpointingTrainer):
    """A Trainer of a `DistillationModel`, whose student `from_pretrained` loads from any folder that is saved."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._saved_processor = copy.deepcopy(self.processing_class)  # a tokenizer keeps how it last padded and cut

    @property
    def student(self) -> PreTrainedModel:
        """The student inside whatever wraps it."""
        student: PreTrainedModel = self.accelerator.unwrap_model(self.model).student
        return student

    @property
    def terms(self) -> Objective:
        """The objective inside whatever wraps it; under `objective` the Trainer keeps another."""
        terms: Objective = self.accelerator.unwrap_model(self.model).objective
        return terms

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = output_dir or str(self.args.output_dir)
        of_objective = self.terms.state_dict()
        if state_dict is not None:  # gathered from shards, under the wrapper's names
            of_objective = inside("objective.", state_dict)
            state_dict = inside("student.", state_dict)
        self.student.save_pretrained(folder, state_dict=state_dict)
        if self._saved_processor is not None:
            self._saved_processor.save_pretrained(folder)
        self.terms.export(Path(folder), of_objective)
        if of_objective and self._saving:
            torch.save(of_objective, Path(folder, OBJECTIVE))

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None when pushing to the hub: the Trainer's would replace the one that the report writes."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:  # shards of the wrapper
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        # Through the class, which undoes what saving may have renamed. Every tensor of the student must be there.
        saved = type(self.student).from_pretrained(resume_from_checkpoint).state_dict()
        self.student.load_state_dict({name: saved[name] for name in self.student.state_dict()})
        self._load_objective(Path(resume_from_checkpoint))

    def _load_objective(self, checkpoint: Path) -> None:
        """Raises `ValueError` for a checkpoint of an objective with other parameters."""
        path = checkpoint / OBJECTIVE
        saved = torch.load(path, map_location="cpu", weights_only=True) if path.exists() else {}
        sizes, wanted = (
            {name: tuple(x.shape) for name, x in state.items()} for state in (saved, self.terms.state_dict())
        )
        if sizes != wanted:
            raise UsageError(f"{checkpoint} is of an objective with parameters {sizes}, this one has {wanted}")
        self.terms.load_state_dict(saved)

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
