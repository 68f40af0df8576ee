"""What a finished run leaves beside the student: metrics.json, report.md, curves.png and a model card, README.md."""

import json
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from minilm.cli.hints import hints
from minilm.escapes import markdown, printable
from minilm.evaluation.table import markdown_table
from minilm.models.agreement import FEWEST_TEXTS
from minilm.training.finite import without_nan
from minilm.training.folders import close_aside, open_aside, publish
from minilm.training.runs import METRICS

Metrics = dict[str, Any]
History = list[dict[str, Any]]  # of Trainer.state.log_history: rows of losses, each with its step

logger = logging.getLogger(__name__)
_ON_THE_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")  # names there
PARTS = {"embedding": "embedding", "transformer": "Transformer", "total": "all"}


def publish_report(output: Path, metrics: Metrics, history: History) -> str:
    """Writes the four files aside, puts them beside the student in `output`, and returns report.md.

    What stands under their names and was not written by this run is left alone; a warning says where its own are.

    Args: those of `write_report`.
    """
    part = open_aside(output) / "report"
    part.mkdir()
    report = write_report(part, metrics, history, student=output)
    if in_the_way := publish(part, output, last=METRICS):
        logger.warning(
            "%s in %s was not written by this run and was left alone; its own is in %s",
            *(", ".join(in_the_way), output, part),
        )
    else:
        close_aside(output)
    return report


def write_report(folder: Path, metrics: Metrics, history: History, student: Path | None = None) -> str:
    """Writes the four files into `folder` and returns report.md.

    Args:
        student: where the student is, if not in `folder`.
        metrics: as `minilm.cli.distill` gathers them: "heldout" {relation: {"start", "end"}} in nats; "parameters" and
            "speeds" {"teacher", "student"}; "arguments"; and what describes the run.
        history: the Trainer's log; each relation's training and held-out losses are drawn from it.
    """
    student = student or folder
    report = report_markdown(student, metrics)
    plot_curves(list(metrics["heldout"]), history).savefig(folder / "curves.png", dpi=120)
    (folder / "report.md").write_text(report, encoding="utf-8")
    (folder / "README.md").write_text(model_card(student, metrics), encoding="utf-8")
    aside = folder / (METRICS + ".part")
    aside.write_text(json.dumps(without_nan(metrics), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(aside, folder / METRICS)
    return report


def overview(metrics: Metrics) -> str:
    """What is about to be trained, for the terminal."""
    data, before = metrics["data"], metrics["steps_before_resuming"]

    def size(side: str) -> str:
        model, count = metrics[side], {part: _count(number) for part, number in metrics["parameters"][side].items()}
        return (
            f"{model['layers']} layers x {model['hidden_size']}, {model['heads']} heads, {count['total']} parameters "
            f"({count['embedding']} embedding, {count['transformer']} Transformer)"
        )

    lines = [
        f"teacher    {metrics['teacher']['name']}: {size('teacher')}",
        f"student    {size('student')}",
        f"objective  {_objective(metrics)}",
        f"data       {_data(data)}{_files(data)}",
        f"device     {metrics['device']}",
        f"folder     {metrics['student']['name']}{f', continued after step {before}' if before else ''}",
        *(f"hint       {told}" for told in hints(metrics)),
        "",
    ]
    return "\n".join(map(printable, lines))


def report_markdown(folder: Path, metrics: Metrics) -> str:
    """The run in two tables and a curve, and how to load its student."""
    teacher, student = metrics["teacher"], metrics["student"]
    parameters, speeds = metrics["parameters"], metrics["speeds"]
    sizes = [
        ["layers x hidden size", *(f"{model['layers']} x {model['hidden_size']}" for model in (teacher, student)), ""],
        *(_compare(f"{label} parameters", parameters, part, _count) for part, label in PARTS.items()),
        *(_compare(unit.replace("_", " "), speeds, unit, _rate) for unit in speeds["student"]),
    ]
    losses = [
        [relation, f"{ends['start']:.4f}", f"{ends['end']:.4f}", _ratio(ends["end"], ends["start"])]
        for relation, ends in metrics["heldout"].items()
    ]
    return "\n".join(
        [
            f"# Distillation of {markdown(teacher['name'])}",
            "",
            _what_was_done(metrics),
            "",
            *markdown_table(["", "teacher", "student", "student / teacher"], sizes),
            "",
            f"Speeds are of the whole models, forward only, on held-out text in batches of {metrics['speed_batch']}, "
            f"measured on {metrics['device']}.",
            "",
            *markdown_table(["held-out loss", "untrained", "trained", "trained / untrained"], losses),
            "",
            "![losses by step](curves.png)",
            "",
            *_how_to_load(folder, metrics),
            *_agreement(metrics),
            *_how_to_use(folder, metrics),
        ]
    )


def model_card(folder: Path, metrics: Metrics) -> str:
    """A short README.md for the student's folder, with the hub's front matter."""
    teacher, student = metrics["teacher"], metrics["student"]
    name = metrics["arguments"]["teacher"] or ""
    # A folder's name would point to another model on the hub, or to none.
    base = [f"base_model: {name}"] if _ON_THE_HUB.fullmatch(name) and not Path(name).exists() else []
    losses = ", ".join(f"{name} {ends['start']:.3f} to {ends['end']:.3f}" for name, ends in metrics["heldout"].items())
    tags = ["minilm", "distillation", *(["sentence-transformers"] if metrics["sentence_files"] else [])]
    return "\n".join(
        [
            "---",
            "library_name: transformers",
            *base,
            f"tags: [{', '.join(tags)}]",
            "---",
            f"# {student['layers']} x {student['hidden_size']} student of {markdown(teacher['name'])}",
            "",
            f"{_count(metrics['parameters']['student']['total'])} parameters. {_what_was_done(metrics)}",
            "",
            f"Held-out losses, from the untrained student to this one: {losses}.",
            "",
            *_how_to_load(folder, metrics),
            *_how_to_use(folder, metrics),
        ]
    )


def plot_curves(relations: list[str], history: History) -> Figure:
    """Each relation's loss by step: a line for training, points for held-out text; the loss axis is logarithmic."""
    figure = Figure(figsize=(7, max(4, 0.5 * len(relations))), layout="constrained")  # two lines of legend a relation
    axes = figure.subplots()
    for index, relation in enumerate(relations):
        train = [(row["step"], row[relation]) for row in history if relation in row]
        heldout = [(row["step"], row[f"eval_{relation}"]) for row in history if f"eval_{relation}" in row]
        name = relation.upper()
        axes.plot(*zip(*train, strict=True), color=f"C{index}", linewidth=1, label=f"{name} training")
        axes.plot(*zip(*heldout, strict=True), "o", color=f"C{index}", label=f"{name} held-out")
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="Losses")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def _objective(metrics: Metrics) -> str:
    parts = " + ".join(name if weight == 1 else f"{weight:g} {name}" for name, weight in metrics["parts"].items())
    heads = f" over {metrics['relation_heads']} relation heads" if metrics.get("relation_heads") else ""
    layer = f" on teacher layer {metrics['teacher_layer']}" if metrics["teacher_layer"] else ""
    layers = f" on layers {metrics['layer_map']}" if metrics.get("layer_map") else layer
    return f"{metrics['objective']} ({parts}{heads}){layers}"


def _what_was_done(metrics: Metrics) -> str:
    data, before = metrics["data"], metrics["steps_before_resuming"]
    last = f", the last {metrics['steps'] - before}" if before else ""
    unit = "packed rows" if data["packed"] else data["unit"]
    return (
        f"Objective {_objective(metrics)}: {metrics['steps']} steps of {data['sequences_per_step']} {unit}{last} in "
        f"{_duration(metrics['seconds'])} on {metrics['device']}{_pace(metrics)}; from {markdown(_data(data))}."
    )


def _data(data: Metrics) -> str:
    count = f"{data['train_sequences']:,} {data['unit']} of " if data["train_sequences"] else "a stream of "
    length = f", up to {data['max_length']} tokens" if data["max_length"] else ""
    bad = f"; {data['bad_records']:,} rows that cannot be read passed over" if "bad_records" in data else ""
    return f"{count}{data['name']}, {data['heldout_sequences']:,} more held out{length}{_vocabulary(data)}{bad}"


def _vocabulary(data: Metrics) -> str:
    if "vocabulary" not in data:
        return ""
    kept, whole, share = (data["vocabulary"][name] for name in ("kept", "of", "share"))
    return f"; {kept:,} of the teacher's {whole:,} tokens, {share:.1%} of those in the text"


def _files(data: Metrics) -> str:
    """What of the folders was read, and which copies of held-out texts were not."""
    files = [f"; of {source}: {what}" for source, what in data.get("files", {}).items()]
    copies = data.get("copies_left_out")
    return "".join(files) + (f"; {copies:,} copies of held-out texts left out" if copies else "")


def _pace(metrics: Metrics) -> str:
    pace = metrics["training"]
    return "".join(f" at {_rate(value)} {name.removesuffix('_per_second')} a second" for name, value in pace.items())


def _how_to_load(folder: Path, metrics: Metrics) -> list[str]:
    vision = metrics["processor"] == "image processor"
    name, loader = ("processor", "AutoImageProcessor") if vision else ("tokenizer", "AutoTokenizer")
    return [
        "```python",
        f"from transformers import {metrics['auto_class']}, {loader}",
        "",
        f"student = {metrics['auto_class']}.from_pretrained({str(folder)!r})",
        f"{name} = {loader}.from_pretrained({str(folder)!r})",
        "```",
        "",
        _what_it_is_for(metrics),
        "",
    ]


def _what_it_is_for(metrics: Metrics) -> str:
    if metrics["learns_the_end"]:
        return "The whole student was trained, up to what it returns: it serves as it is."
    if metrics["serves"]:
        return (
            "The relations train all that lies below the last layer's queries, keys and values. What lies above them "
            "is the teacher's own last layer, unchanged: the student serves as it is."
        )
    if metrics["learns_hidden"]:
        return "Its hidden states were trained, and no head: fine-tune the student on a task before use."
    layer = "highest layer's that learns, its" if metrics.get("layer_map") else "last layer's"
    return (
        f"The relations end at the {layer} queries, keys and values. What lies above them is untrained: fine-tune "
        "the student on a task before use. One with the teacher's width, from its layers and with the relations of its "
        "last layer, serves at once."
    )


def _agreement(metrics: Metrics) -> list[str]:
    """What comes out, beside what the teacher gives."""
    agreement = metrics["agreement"]
    if agreement is None:
        texts = f"there are {metrics['data']['heldout_sequences']}."
        of_few = [f"Agreement with the teacher is measured on at least {FEWEST_TEXTS} held-out texts; {texts}", ""]
        return of_few if metrics["processor"] == "tokenizer" else []
    start, end = agreement["start"], agreement["end"]
    nearest = f"shared among the {agreement['neighbours']} nearest neighbours"
    header = [f"agreement with the teacher on {agreement['texts']} held-out texts", "untrained", "trained"]
    rows = [
        ["correlation of cosine similarities (Spearman)", f"{start['correlation']:.3f}", f"{end['correlation']:.3f}"],
        [nearest, f"{start['neighbours']:.0%}", f"{end['neighbours']:.0%}"],
    ]
    examples = [
        line
        for example in agreement["examples"]
        for line in (
            f"- {markdown(example['text'])}",
            f"  - teacher: {markdown(example['teacher'])}",
            f"  - student: {'the same' if example['student'] == example['teacher'] else markdown(example['student'])}",
        )
    ]
    return [
        *markdown_table(header, rows),
        "",
        f"Vectors are made by {' and '.join(metrics['pooling'])} pooling of the last hidden states. Five of the texts, "
        "each with its nearest neighbour:",
        "",
        *examples,
        "",
    ]


def _how_to_use(folder: Path, metrics: Metrics) -> list[str]:
    """Lines that make a vector of a sentence, or fill in a masked word, where the student serves for that."""
    if metrics["processor"] != "tokenizer" or not metrics["serves"]:
        return []
    if metrics["sentence_files"]:
        lines = [
            "from sentence_transformers import SentenceTransformer",
            f'vectors = SentenceTransformer({str(folder)!r}).encode(["A sentence.", "And another one."])',
        ]
    elif metrics["auto_class"] == "AutoModelForMaskedLM":
        lines = [
            "from transformers import pipeline",
            f'fill = pipeline("fill-mask", {str(folder)!r})',
            'words = fill(f"A {fill.tokenizer.mask_token} sentence.")',
        ]
    else:
        token = {"cls": "[0]", "lasttoken": "[-1]"}.get(metrics["pooling"][0], ".mean(0)")
        lines = [
            "from transformers import pipeline",
            f'vector = pipeline("feature-extraction", {str(folder)!r})("A sentence.", return_tensors=True)[0]{token}',
        ]
    return ["```python", *lines, "```", ""]


def _compare(name: str, pair: Metrics, key: str, text: Callable[[float], str]) -> list[str]:
    teacher, student = pair["teacher"][key], pair["student"][key]
    return [name, text(teacher), text(student), _ratio(student, teacher)]


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds"


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.2f}" if base else ""  # a student that starts as its teacher has no loss to lower


def _count(value: float) -> str:
    return f"{value / 1e6:.1f}M" if value >= 1e5 else f"{value:,.0f}"


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
