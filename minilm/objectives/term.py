"""An objective is a list of terms, each a loss between two models and the mean over units of its own.

Over an optimiser step of several micro-batches and ranks a term's loss is the mean over the units of the whole step: a
micro-batch with n of the step's n_step units weighs n / n_step, its share. DDP and FSDP average the gradients of W
ranks, so each share is multiplied by W.

    loss = sum over terms of share(unit) * term,   term = sum over parts of weight(part) * part
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minilm.errors import UsageError
from minilm.models.batches import Batch, count_examples, count_labels, count_sequences, count_tokens
from minilm.models.layers import num_layers
from minilm.models.observe import Needs, Observed, resolve_needs
from minilm.models.probes import probe_inputs
from minilm.models.students import freeze_unreached, observe_probe

# Those with tokens; all but padding; the rows of a batch; the tokens that were masked, which have labels.
Unit = Literal["sequences", "tokens", "examples", "labels"]
COUNTS = {"sequences": count_sequences, "tokens": count_tokens, "examples": count_examples, "labels": count_labels}
LOSS = "loss"  # the sum, among the parts' names


class Term(nn.Module):
    """A loss between two models. Its parameters are trained and checkpointed beside the student, and no part of it
    unless `export` makes some so.

    A subclass sets:
        unit: what its loss is the mean over.
        parts: the names under which it is logged, each with its weight in the loss.
        teacher, student: what it needs of either model.
        causal: whether it lets tokens see those before them alone; the models' masks of packed rows then say so too.
    """

    unit: Unit
    parts: dict[str, float]
    teacher: Needs = Needs()
    student: Needs = Needs()
    causal: bool = False

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from another term of its class, JSON-able: for reports, and for runs that are continued."""
        return {}

    def forward(self, teacher: Observed, student: Observed, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the parts, a float32 scalar, and the parts by name, detached: means over the units.

        Args:
            batch: the student's inputs; its attention_mask (B, N) is of the student's tokens.
        """
        raise NotImplementedError

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Writes into the student's folder what of the term belongs to the student: by default nothing.

        Args:
            state: the term's, gathered from shards.
        """


class Objective(nn.ModuleList):
    """The sum of some terms.

    Args:
        terms: in the order in which they are added up and logged.
        causal: whether the models are decoders, where no term says so; of packed rows alone it must be known.

    Raises:
        ValueError: no term, or two parts of one name.
    """

    def __init__(self, terms: Iterable[Term], causal: bool = False) -> None:
        super().__init__(terms)
        if not len(self):
            raise UsageError("an objective needs at least one term, it has 0")
        names = [LOSS, *(part for term in self for part in term.parts)]
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"two parts of the objective are named {twice!r}, of {', '.join(names)}")
        self.causal = causal or any(term.causal for term in self)

    def __iter__(self) -> Iterator[Term]:
        return cast(Iterator[Term], super().__iter__())

    @property
    def parts(self) -> dict[str, float]:
        """The names of all parts, each with its weight."""
        return {part: weight for term in self for part, weight in term.parts.items()}

    @property
    def units(self) -> dict[str, Unit]:
        """What each part is the mean over."""
        return {part: term.unit for term in self for part in term.parts}

    @property
    def identity(self) -> dict[str, Any]:
        """What the terms say of themselves."""
        return {name: value for term in self for name, value in term.identity.items()}

    @property
    def learns_the_end(self) -> bool:
        """Whether it trains the whole student, up to what it returns."""
        return self.student.final or self.student.output

    @property
    def teacher(self) -> Needs:
        """What the terms together need of the teacher."""
        return _union(term.teacher for term in self)

    @property
    def student(self) -> Needs:
        """What the terms together need of the student."""
        return _union(term.student for term in self)

    def forward(
        self, teacher: Observed, student: Observed, batch: Batch, shares: Mapping[Unit, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """{"loss", part: its mean over the batch}, float32 scalars; the parts are detached.

        Args:
            teacher, student: with what `self.teacher` and `self.student` name.
            shares: how much of its step the batch is, by unit; None: all of it.
        """
        outputs: dict[str, Tensor] = {}
        for term in self:
            loss, parts = term(teacher, student, batch)
            loss = loss if shares is None else loss * shares[term.unit]
            outputs[LOSS] = outputs[LOSS] + loss if LOSS in outputs else loss
            outputs |= parts
        return outputs

    def export(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Writes into the student's folder what of the terms belongs to the student; `state` is the objective's."""
        for index, term in enumerate(self):
            term.export(folder, inside(f"{index}.", state))

    def probe(self, teacher: PreTrainedModel, student: PreTrainedModel) -> Tensor:
        """The loss on the shortest input, in eval mode, on which all that the terms need is tried.

        Raises `ValueError` as `observe` and a term.
        """
        batch = probe_inputs(student)
        if "labels" in self.units.values():
            batch["labels"] = batch["input_ids"]
        with torch.no_grad():
            given = observe_probe(teacher, self.teacher)
        loss: Tensor = self(given, observe_probe(student, self.student), batch)[LOSS]
        return loss

    def freeze_unused(self, teacher: PreTrainedModel, student: PreTrainedModel) -> list[str]:
        """Set `requires_grad=False` on what of the student the loss does not reach; returns those parameters' names.

        Raises:
            ValueError: as `probe` and `freeze_unreached`.
        """
        with torch.enable_grad():
            loss = self.probe(teacher, student)
        layers = resolve_needs(student, self.student)
        highest = num_layers(student) if self.learns_the_end else max(*layers.qkv, *layers.hidden, 0, 0)
        return freeze_unreached(student, loss, highest)


def inside(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of a state dict what begins with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _union(needs: Iterable[Needs]) -> Needs:
    all_needs = list(needs)
    qkv = dict.fromkeys(layer for need in all_needs for layer in need.qkv)
    hidden = dict.fromkeys(layer for need in all_needs for layer in need.hidden)
    final, output = (any(getattr(need, name) for need in all_needs) for name in ("final", "output"))
    return Needs(tuple(qkv), tuple(hidden), final, output)
