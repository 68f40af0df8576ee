#!/usr/bin/env python3
"""What frozen sentence vectors are worth downstream: STS-B and TREC, for any folders or names that AutoModel loads.

    python bench/encoder_quality.py minilm-demo --stsb validation.parquet --trec train.parquet test.parquet

The vectors are means over the tokens of the last hidden states. STS-B is Spearman's correlation of cosine similarities
with the judgements. TREC is the accuracy of scikit-learn's logistic regression (standardised features, C = 1) on the
coarse question classes. Both are times 100. The files are those of the hub's nyu-mll/glue (stsb) and CogComp/trec. Of
STS-B the columns sentence1, sentence2 and label are read, of TREC text and coarse_label. Needs the `demo` extra.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from _arguments import make_parser
from scipy.stats import spearmanr
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from minilm.models.embeddings import MEAN, pool

BATCH, MAX_LENGTH = 64, 128


def main(argv: Sequence[str] | None = None) -> int:
    """0; 2 where a file is missing."""
    parser = make_parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL", help="folder or name that AutoModel loads")
    parser.add_argument("--stsb", required=True, type=Path, metavar="FILE", help="Parquet file of the validation split")
    parser.add_argument(
        "--trec", required=True, type=Path, nargs=2, metavar=("TRAIN", "TEST"), help="Parquet files of the two splits"
    )
    arguments = parser.parse_args(argv)
    missing = [str(path) for path in (arguments.stsb, *arguments.trec) if not path.is_file()]
    if missing:
        print(f"no such file: {', '.join(missing)}", file=sys.stderr)
        return 2
    pairs, (train, test) = pd.read_parquet(arguments.stsb), map(pd.read_parquet, arguments.trec)
    print(f"{'model':<32} {'STS-B':>6} {'TREC':>6}")
    for name in arguments.models:
        model, tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
        print(
            f"{name:<32} {stsb(model, tokenizer, pairs):>6.1f} {trec(model, tokenizer, train, test):>6.1f}", flush=True
        )
    return 0


def stsb(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: pd.DataFrame) -> float:
    first, second = (encode(model, tokenizer, list(pairs[column])) for column in ("sentence1", "sentence2"))
    return 100 * float(spearmanr(functional.cosine_similarity(first, second).numpy(), pairs["label"])[0])


def trec(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train: pd.DataFrame, test: pd.DataFrame) -> float:
    features = [encode(model, tokenizer, list(split["text"])).numpy() for split in (train, test)]
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return 100 * float(classifier.fit(features[0], train["coarse_label"]).score(features[1], test["coarse_label"]))


@torch.inference_mode()
def encode(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> torch.Tensor:
    """(texts, d), in batches of similar lengths."""
    order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
    vectors = []
    for start in range(0, len(order), BATCH):
        some = [texts[index] for index in order[start : start + BATCH]]
        inputs = tokenizer(some, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
        vectors.append(pool(model(**inputs).last_hidden_state, inputs["attention_mask"], MEAN))
    return torch.cat(vectors)[torch.tensor(order).argsort()]


if __name__ == "__main__":
    sys.exit(main())
