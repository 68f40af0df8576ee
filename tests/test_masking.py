"""Masked tokens: how many and which, the same wherever a text comes, others in every step."""

from typing import Any

import pytest
import torch
from tiny_text import tiny_tokenizer
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from minilm.objectives.masking import HELD_OUT, Masking


def rows(count: int, length: int) -> dict[str, Tensor]:
    """Random tokens between a first and a last special one, the last quarter of each second row behind the mask."""
    tokenizer = tiny_tokenizer()
    special = set(tokenizer.all_special_ids)
    ordinary = torch.tensor([token for token in range(len(tokenizer)) if token not in special])
    ids = ordinary[torch.randint(len(ordinary), (count, length), generator=torch.Generator().manual_seed(0))]
    mask = torch.ones_like(ids)
    mask[1::2, -(length // 4) :] = 0
    ids[:, 0] = tokenizer.cls_token_id
    ids[:, -1] = tokenizer.sep_token_id
    return {"input_ids": ids, "attention_mask": mask}


def test_the_rates_are_the_papers() -> None:
    """BERT, section 3.1: 15 % of the tokens, of which 80 % become masks, 10 % random tokens and 10 % stay."""
    tokenizer, batch = tiny_tokenizer(), rows(400, 100)
    masked = Masking(tokenizer)(batch, 0)
    chosen = masked["labels"] != -100
    special = torch.isin(batch["input_ids"], torch.tensor(tokenizer.all_special_ids))
    assert not (chosen & (special | (batch["attention_mask"] == 0))).any()
    assert torch.equal(masked["labels"][chosen], batch["input_ids"][chosen])
    assert torch.equal(masked["input_ids"][~chosen], batch["input_ids"][~chosen])
    ordinary = ~special & (batch["attention_mask"] == 1)
    assert chosen.sum() / ordinary.sum() == pytest.approx(0.15, abs=0.01)  # five standard deviations
    now, before = masked["input_ids"][chosen], batch["input_ids"][chosen]
    is_mask = now == tokenizer.mask_token_id
    assert is_mask.float().mean() == pytest.approx(0.8, abs=0.03)
    assert (now == before).float().mean() == pytest.approx(0.1 + 0.1 / len(tokenizer), abs=0.025)
    others = now[~is_mask & (now != before)]
    assert len(others.unique()) > 0.9 * (len(tokenizer) - 1)
    by_place = chosen.float().mean(0)[1:70]
    assert by_place.min() > 0.07
    assert by_place.max() < 0.24


def test_a_text_is_masked_alike_wherever_it_comes_and_anew_in_every_step() -> None:
    masking, batch = Masking(tiny_tokenizer(), seed=3), rows(8, 40)
    whole = masking(batch, 5)["labels"]
    order = torch.tensor([3, 0, 7])
    assert torch.equal(masking({name: x[order] for name, x in batch.items()}, 5)["labels"], whole[order])
    padded = {name: torch.nn.functional.pad(x, (0, 6)) for name, x in batch.items()}
    assert torch.equal(masking(padded, 5)["labels"][:, :40], whole)
    again = Masking(tiny_tokenizer(), seed=3)
    assert torch.equal(again(batch, 5)["labels"], whole)
    for other in (masking(batch, 6), masking(batch, HELD_OUT), Masking(tiny_tokenizer(), seed=4)(batch, 5)):
        both = ((other["labels"] != -100) & (whole != -100)).sum() / (whole != -100).sum()
        assert both < 0.5  # 0.15 if nothing ties them


def test_the_words_of_a_wordpiece_tokenizer_are_masked_whole() -> None:
    tokenizer, batch = tiny_tokenizer(), rows(300, 60)
    continues = torch.tensor([token.startswith("##") for token in tokens_of(tokenizer)])[batch["input_ids"]]
    continues &= batch["attention_mask"] == 1
    assert continues.float().mean() > 0.05
    chosen = Masking(tokenizer, whole_words=True)(batch, 0)["labels"] != -100
    assert torch.equal(chosen[:, 2:][continues[:, 2:]], chosen[:, 1:-1][continues[:, 2:]])
    begins = ~continues & (batch["attention_mask"] == 1)
    begins[:, [0, -1]] = False
    assert chosen[begins].float().mean() == pytest.approx(0.15, abs=0.015)


def test_a_word_ends_where_a_text_ends() -> None:
    """Byte-level BPE marks the words that follow a space; the first of a text follows none. GPT-2's has a "##" too."""
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<mask>", "\u0120a", "b", "c", "##"])}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), bos_token="<s>", eos_token="</s>", mask_token="<mask>"
    )
    row = tokenizer.convert_tokens_to_ids(["<s>", "b", "\u0120a", "c", "</s>", "b", "</s>"])
    masking = Masking(tokenizer, whole_words=True, probability=0.5)
    drawn = [masking({"input_ids": torch.tensor([row])}, step)["labels"][0] != -100 for step in range(20)]
    assert all(labels[2] == labels[3] for labels in drawn)
    for word, other in ((1, 2), (2, 5), (1, 5)):
        assert any(labels[word] != labels[other] for labels in drawn)


def tokens_of(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))]


def test_what_cannot_be_masked_is_one_sentence() -> None:
    def fails(message: str, tokenizer: Any, **options: Any) -> None:
        with pytest.raises(ValueError, match=message):
            Masking(tokenizer, **options)

    fails("mlm_probability is 1.0: it must lie between 0 and 1", tiny_tokenizer(), probability=1.0)
    without = tiny_tokenizer()
    without.mask_token = None
    fails("has no mask token", without)
