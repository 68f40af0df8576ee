"""The smaller vocabulary of a run, which both models read; a student that goes on may have it already."""

from collections.abc import Sequence
from typing import cast

from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from minilm.cli.flags import ModelArguments
from minilm.data.vocabulary import cut_tokenizer, find_kept
from minilm.errors import UsageError, tried
from minilm.models.probes import embedding_rows
from minilm.models.teachers import Processor, loading
from minilm.models.vocabulary import cut_embeddings


def cut_as_student(given: ModelArguments, teacher: PreTrainedModel, processor: Processor) -> list[int] | None:
    """Cuts the teacher to the tokens that --student has, and returns these.

    None without a smaller vocabulary, and where the student has the whole one.

    Raises:
        ValueError: a student that does not load, or whose tokens are not the teacher's in their order.
    """
    name = given.student
    if name is None or given.student_vocabulary is None or not isinstance(processor, PreTrainedTokenizerBase):
        return None
    with loading("student", name):
        rows = getattr(AutoConfig.from_pretrained(name, trust_remote_code=False), "vocab_size", None)
    if rows == embedding_rows(teacher):
        return None
    with loading("student", name, "tokenizer"):
        own = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    kept = find_kept(processor, own)
    if len(kept) != rows:
        raise UsageError(f"the student {name!r} embeds {rows} tokens, its tokenizer has {len(kept)}")
    _cut(teacher, kept)
    return kept


def cut_both(
    given: ModelArguments,
    models: Sequence[PreTrainedModel],
    processors: Sequence[Processor],
    kept: Sequence[int],
    before: Sequence[int] | None,
) -> list[PreTrainedTokenizerBase]:
    """Cuts models in place, where `cut_as_student` has not; returns the tokenizers cut.

    Raises:
        ValueError: the student came with other tokens than the text to train on keeps.
    """
    whole = cast(Sequence[PreTrainedTokenizerBase], processors)
    if before is None:
        for model in models:
            _cut(model, kept)
    elif other := sorted({*kept} ^ {*before}):
        has = "has" if other[0] in before else "lacks"
        raise UsageError(
            f"--student_vocabulary {given.student_vocabulary} keeps {len(kept)} tokens for the text to train on, and "
            f"the student {given.student!r} was cut to {len(before)}: it {has} "
            f"{whole[0].convert_ids_to_tokens(other[0])!r}"
        )
    return [cut_tokenizer(tokenizer, kept) for tokenizer in whole]


def _cut(model: PreTrainedModel, kept: Sequence[int]) -> None:
    with tried("cannot cut the embeddings to --student_vocabulary"):
        cut_embeddings(model, kept)
