#!/usr/bin/env python3
"""What frozen sentence vectors are worth downstream: STS-B and TREC, for any folders or names that AutoModel loads.

    python bench/encoder_quality.py minilm-demo --stsb validation.parquet --trec train.parquet test.parquet

The vectors are what the sentence-transformers files make of the last hidden states, before a normalisation, and means
over the tokens where there are no such files. STS-B is Spearman's correlation of cosine similarities with the
judgements. TREC is the accuracy of scikit-learn's logistic regression (standardised features, C = 1) on the coarse
question classes. Both are times 100. The files are those of the hub's nyu-mll/glue (stsb) and CogComp/trec. Of STS-B
the columns sentence1, sentence2 and label are read, of TREC text and coarse_label. Needs the `demo` extra.
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
from transformers import AutoModel, AutoTokenizer

from minilm.models.embeddings import MEAN, sentence_files
from minilm.models.sentence_modules import Dense, SentenceHead, read_head

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
        encoder = Encoder(name)
        print(f"{name:<32} {stsb(encoder, pairs):>6.1f} {trec(encoder, train, test):>6.1f}", flush=True)
    return 0


class Encoder:
    """A model with its tokenizer and its way from hidden states to a vector."""

    def __init__(self, name: str) -> None:
        self.model, self.tokenizer = AutoModel.from_pretrained(name).eval(), AutoTokenizer.from_pretrained(name)
        head = read_head(files) if (files := sentence_files(name)) else SentenceHead(MEAN)
        self.head = SentenceHead(head.pooling, [module for module in head.further if isinstance(module, Dense)])

    @torch.inference_mode()
    def encode(self, texts: list[str]) -> torch.Tensor:
        """(texts, E), in batches of similar lengths."""
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        vectors = []
        for start in range(0, len(order), BATCH):
            some = [texts[index] for index in order[start : start + BATCH]]
            inputs = self.tokenizer(some, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt")
            vectors.append(self.head(self.model(**inputs).last_hidden_state, inputs))
        return torch.cat(vectors)[torch.tensor(order).argsort()]


def stsb(encoder: Encoder, pairs: pd.DataFrame) -> float:
    first, second = (encoder.encode(list(pairs[column])) for column in ("sentence1", "sentence2"))
    return 100 * float(spearmanr(functional.cosine_similarity(first, second).numpy(), pairs["label"])[0])


def trec(encoder: Encoder, train: pd.DataFrame, test: pd.DataFrame) -> float:
    features = [encoder.encode(list(split["text"])).numpy() for split in (train, test)]
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    return 100 * float(classifier.fit(features[0], train["coarse_label"]).score(features[1], test["coarse_label"]))


if __name__ == "__main__":
    sys.exit(main())
