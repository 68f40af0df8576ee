"""`minilm-augment`: augmented task data for distillation (TinyBERT, section 3.2), as a file of JSON lines."""

import argparse
import itertools
import json
import os
import random
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from minilm.cli.terminal import OneLineErrors, fail, not_installed, patient_streams, positive
from minilm.errors import UsageError

PROGRAM = "minilm-augment"
NEEDED = ("transformers", "datasets")
DESCRIPTION = """\
Writes each record of task data and some copies of it, in which words are replaced: a word that is one token of the
teacher by what its masked LM predicts there, another one by a neighbour in its word embeddings or in a GloVe file.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv` (default: the process's) and returns its exit code.

    0: done. 1: it cannot be done here (a package, a file or a folder that is not there, a full disk, data that cannot
    be read). 2: a wrong flag or value. 130: stopped by Ctrl-C. Each but the first says why in one line.
    """
    with patient_streams():
        arguments = _parse(argv)
        if missing := not_installed(NEEDED):
            return fail(PROGRAM, missing, 1)
        from minilm.data.faults import DataError

        try:
            print(_augment(arguments))
        except KeyboardInterrupt:
            return fail(PROGRAM, f"interrupted; nothing was written to {arguments.output}", 128 + signal.SIGINT)
        except (OSError, DataError) as error:
            return fail(PROGRAM, str(error), 1)
        except UsageError as error:
            return fail(PROGRAM, str(error), 2)
    return 0


def _augment(arguments: argparse.Namespace) -> str:
    """What was done, in a line; the output is there whole or not at all."""
    # Here and not above: they take seconds, and wrong flags must not wait.
    from minilm.data.records import read_records

    output = arguments.output
    if output.exists():
        raise FileExistsError(f"{str(output)!r} exists: name another --output, or remove it")
    if not output.parent.is_dir():
        raise FileNotFoundError(f"the folder of --output {str(output)!r} is not there")
    columns = [arguments.text_column, *([arguments.second_column] if arguments.second_column else [])]
    records = list(read_records(arguments.data, columns))
    if not records:
        raise UsageError(f"{str(arguments.data)!r} holds no record")
    begun = output.with_name(f"{output.name}.part")
    count = 0
    with open(begun, "w", encoding="utf-8") as file:
        try:
            for record in _augmented(records, columns, arguments):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
                count += 1
        except BaseException:
            begun.unlink()
            raise
    os.replace(begun, output)
    return f"{output}: {count:,} records, of the {len(records):,} in {arguments.data}"


def _augmented(
    records: list[dict[str, Any]], columns: list[str], arguments: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Each record, drawn from (seed, its number) alone, and not from how many are read at once."""
    from datasets.utils import tqdm

    from minilm.data.augment import augmented

    substitutes = _substitutes(arguments)
    with tqdm(total=len(records), unit=" records") as bar:
        numbered = enumerate(records)
        while chunk := list(itertools.islice(numbered, arguments.batch_size)):
            of_columns = [substitutes([record[column] for _, record in chunk]) for column in columns]
            for (number, record), *places in zip(chunk, *of_columns, strict=True):
                draw = random.Random(f"{arguments.seed} {number}")
                found = dict(zip(columns, places, strict=True))
                yield from augmented(record, found, arguments.samples, arguments.probability, draw)
            bar.update(len(chunk))


def _substitutes(arguments: argparse.Namespace) -> Any:
    import torch
    from transformers import PreTrainedTokenizerBase

    from minilm.data.records import read_vectors
    from minilm.models.heads import has_vocabulary_head
    from minilm.models.probes import is_causal
    from minilm.models.substitutes import Substitutes
    from minilm.models.teachers import load_teacher, resolve_length

    vectors = None if arguments.glove is None else read_vectors(arguments.glove)
    try:
        model, tokenizer = load_teacher(arguments.teacher, head=True)
    except UsageError as error:
        raise UsageError(str(error).partition(": leave out --output_weight")[0]) from error  # a flag of minilm-train
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not has_vocabulary_head(model) or is_causal(model):
        raise UsageError(
            f"the teacher {arguments.teacher!r} is a {type(model).__name__}: masked words are predicted by a masked LM"
        )
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()  # type: ignore[arg-type]
    return Substitutes(
        model,
        tokenizer,
        count=arguments.candidates,
        vectors=vectors,
        max_length=resolve_length(model, tokenizer, None),
        batch_size=arguments.batch_size,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = OneLineErrors(
        prog=PROGRAM,
        description=DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("data", type=Path, help="a .csv, .tsv or .jsonl file; columns without text are copied")
    parser.add_argument("--teacher", required=True, help="name or folder of a masked LM")
    parser.add_argument("--output", required=True, type=_json_lines, help="the .jsonl file to write")
    parser.add_argument("--text_column", default="text", help="whose words are replaced")
    parser.add_argument("--second_column", help="another one, of tasks on pairs of texts")
    parser.add_argument("--glove", type=Path, help="file of word vectors, instead of the teacher's word embeddings")
    parser.add_argument("--samples", type=positive, default=20, help="copies of each record")
    parser.add_argument("--probability", type=_share, default=0.4, help="of a word to be replaced")
    parser.add_argument("--candidates", type=positive, default=15, help="substitutes of a word, of which one is drawn")
    parser.add_argument("--batch_size", type=positive, default=64, help="masked texts that the teacher reads at once")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn")
    return parser.parse_args(argv)


def _json_lines(text: str) -> Path:
    path = Path(text)
    if path.suffix != ".jsonl":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .jsonl")
    return path


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0 and up to 1")
    return share
