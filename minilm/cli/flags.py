"""The flags of `minilm-train` by group, each with its help; `arguments` reads them."""

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments


def _about(help: str, metavar: str | None = None) -> dict[str, str]:
    return {"help": help} if metavar is None else {"help": help, "metavar": metavar}


@dataclass
class ModelArguments:
    """Which teacher, and what student."""

    _argument_group_name = "teacher and student"

    teacher: str | None = field(
        default=None, metadata=_about("Model to distil: a name on the hub or a folder.", "NAME|DIR")
    )
    teacher_layer: int = field(
        default=-1,
        metadata=_about("Teacher layer whose relations are learnt: 1 to L from the bottom, or -1 to -L.", "L"),
    )
    student: str | None = field(
        default=None,
        metadata=_about(
            "Student that goes on from its weights, a folder or a name on the hub, in place of the sizes below.",
            "NAME|DIR",
        ),
    )
    student_num_layers: int | None = field(
        default=None, metadata=_about("Layers of the student (default: the teacher's).", "M")
    )
    student_hidden_size: int | None = field(
        default=None, metadata=_about("Hidden size of the student (default: the teacher's).", "H")
    )
    student_num_heads: int | None = field(
        default=None, metadata=_about("Attention heads of the student (default: the teacher's).", "A")
    )
    student_intermediate_size: int | None = field(
        default=None,
        metadata=_about("Feed-forward size (default: in the teacher's ratio to the hidden size).", "F"),
    )
    student_embedding_dim: int | None = field(
        default=None,
        metadata=_about(
            "Numbers in the student's sentence vectors, with --embedding_weight (default: the teacher's). With the "
            "student's own width no dense layer is saved.",
            "E",
        ),
    )
    student_vocabulary: int | None = field(
        default=None,
        metadata=_about(
            "Tokens of the student: the N that the training text uses most (of a stream its first 100,000 texts), and "
            "beyond N the special ones, single letters and what the merges of BPE need (default: the teacher's).",
            "N",
        ),
    )
    student_init: Literal["auto", "random", "layers", "slice", "pca"] = field(
        default="auto",
        metadata=_about(
            "Weights to start from. layers: the teacher's, evenly and the last layer included; slice: these, cut to "
            "the student's sizes; pca: the teacher's embeddings on their leading principal components, the rest "
            "random; random; auto: layers where the sizes match, else random."
        ),
    )
    student_init_layers: str | None = field(
        default=None,
        metadata=_about("Layers of the teacher to start from instead, bottom to top, as in 1,3,6.", "LAYERS"),
    )
    assistant_num_layers: int | None = field(
        default=None,
        metadata=_about(
            "Layers of a teacher assistant (MiniLM, section 3.4), which learns from the teacher first and teaches the "
            "student then. It stays in OUTPUT_DIR/assistant.",
            "M",
        ),
    )
    assistant_hidden_size: int | None = field(
        default=None, metadata=_about("Hidden size of the assistant (default: the teacher's).", "H")
    )


@dataclass
class DataArguments:
    """Which text, or which images."""

    _argument_group_name = "data"

    data: list[str] | None = field(
        default=None,
        metadata=_about(
            "Text to distil on: .txt (a text a line), .csv, .json, .jsonl, .arrow or .parquet files, folders of one "
            "kind of them (of which the training split is read), or names of data sets on the hub. For a vision "
            "teacher folders or .parquet files of images. One text in twenty, at most 512, is held out.",
            "NAME|FILE|DIR",
        ),
    )
    data_weights: list[float] | None = field(
        default=None,
        metadata=_about("How often each of the data is drawn from, relative to the others (default: as it is).", "W"),
    )
    data_config: str | None = field(
        default=None, metadata=_about("Configuration of the data sets from the hub.", "CONFIG")
    )
    text_column: str = field(default="text", metadata=_about("Column with the text; .txt files need none.", "COLUMN"))
    text_pair_column: str | None = field(
        default=None,
        metadata=_about("Column with a second text, which follows the first one in its sequence.", "COLUMN"),
    )
    image_column: str = field(default="image", metadata=_about("Column with the image.", "COLUMN"))
    on_bad_record: Literal["stop", "skip"] = field(
        default="stop",
        metadata=_about(
            "At a row that cannot be read (not UTF-8, no JSON, fields too many, no text in the column): stop with its "
            "place, or pass over it; the report then counts such rows. A run that has stopped may go on with skip."
        ),
    )
    streaming: bool = field(
        default=False,
        metadata=_about("Read the data as they come, without indexing them first; needs --max_steps."),
    )
    shuffle_buffer: int = field(
        default=10_000, metadata=_about("With --streaming: texts that are shuffled among each other.", "TEXTS")
    )
    packing: bool = field(
        default=False,
        metadata=_about("Put several texts into a row of --max_length tokens; they do not see each other."),
    )
    max_length: int | None = field(
        default=None,
        metadata=_about("Tokens at which a text is cut off (default: 512, or the teacher's positions if fewer).", "N"),
    )


@dataclass
class ObjectiveArguments:
    """What is learnt."""

    _argument_group_name = "objective"

    objective: Literal[
        "minilm",
        "minilm-v2",
        "mlm",
        "mlm-kd",
        "distilbert",
        "tinybert",
        "tinybert-task",
        "mobilebert",
        "mobilebert-joint",
        "mobilebert-progressive",
        "mobilebert-transfer",
        "mobilebert-distillation",
        "embedding",
    ] = field(
        default="minilm",
        metadata=_about(
            "minilm: relations QK and VV; minilm-v2: QQ, KK and VV over relation heads; mlm: the masked LM's loss "
            "without the teacher; mlm-kd: the teacher's logits of masked tokens; distilbert: its logits of all "
            "tokens, the masked LM's loss and the cosine of the last hidden states; tinybert: embeddings, hidden "
            "states and attention scores, layer by layer; tinybert-task: these on a classifier's texts, in "
            "OUTPUT_DIR/intermediate, and then its answers; mobilebert: feature maps and attention, layer by layer "
            "(-transfer), beside the logits of masked tokens and the masked LM's loss (-distillation), or the one in "
            "OUTPUT_DIR/transfer and then the other (-joint), or the one for each layer after those below, in "
            "OUTPUT_DIR/layer-1 and so on, and then the other (-progressive); embedding: the vectors of sentences "
            "alone."
        ),
    )
    relations: str | None = field(
        default=None,
        metadata=_about("Other relations than the objective's, with weights: qk,vv or qk:1,vv:0.5.", "PAIRS"),
    )
    layer_map: str | None = field(
        default=None,
        metadata=_about(
            "Which layers of the student learn from which of the teacher, student:teacher, as in 1:4,2:8,3:12 "
            "(default: of relations the last from --teacher_layer; of tinybert each from a layer, evenly).",
            "PAIRS",
        ),
    )
    intermediate_steps: int | None = field(
        default=None, metadata=_about("Steps of each run before the last of several (default: as the last).", "N")
    )
    lower_lr_factor: float | None = field(
        default=None,
        metadata=_about(
            "Learning rate of the layers below the lowest that learns, as a part of its own; 0 freezes them (default: "
            "of mobilebert-progressive 0, where MobileBERT's published code has 0.1; of mobilebert-transfer 1).",
            "F",
        ),
    )
    relation_heads: int | None = field(
        default=None,
        metadata=_about(
            "Heads that queries, keys and values are split into for the relations (default: for minilm the models' "
            "own, for minilm-v2 four to each of the teacher's, or the teacher's where the widths do not divide).",
            "R",
        ),
    )
    output_weight: float = field(
        default=0.0,
        metadata=_about(
            "Weight of the output loss beside the relations: KL between the logits of masked-LM, causal-LM or "
            "classification heads, which both models then have.",
            "W",
        ),
    )
    output_temperature: float = field(
        default=1.0, metadata=_about("Divides the logits of both models in the output loss (of distilbert: 2).", "T")
    )
    embedding_weight: float | None = field(
        default=None,
        metadata=_about(
            "Weight of the loss of the sentence vectors beside the objective's own (default: 0; of --objective "
            "embedding 1). They are made as the teacher's sentence-transformers files say, or by mean pooling.",
            "W",
        ),
    )
    embedding_loss: Literal["cosine", "mse"] = field(
        default="cosine", metadata=_about("Distance of the vectors: 1 - cosine, or the mean squared difference.")
    )
    pooling: Literal["auto", "cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"] = field(
        default="auto", metadata=_about("How hidden states become a vector, instead of as the teacher's files say.")
    )
    mlm_probability: float = field(
        default=0.15, metadata=_about("Of a token to be masked, where both models read masked text.", "P")
    )
    whole_word_masking: bool = field(default=False, metadata=_about("Mask all tokens of a word together."))
    relation_temperature: float = field(default=1.0, metadata=_about("Divides the scores of both models.", "T"))
    implementation: Literal["auto", "triton", "chunked", "reference"] = field(
        default="auto",
        metadata=_about("How the loss is computed; auto is triton on a CUDA device and chunked elsewhere."),
    )


@dataclass
class RunArguments:
    """How the run goes."""

    _argument_group_name = "run"

    recipe: str | None = field(
        default=None, metadata=_about("Take the flags of a recipe or file; all others override them.", "NAME|FILE")
    )
    list_recipes: bool = field(default=False, metadata=_about("List the recipes and stop."))
    dry_run: bool = field(
        default=False,
        metadata=_about("Build everything, take three steps, print parameters, memory and time, write nothing."),
    )
    check: bool = field(
        default=False,
        metadata=_about(
            "Take the first 100 steps of the demonstration and tell whether its losses lie in the band of the "
            "reference run; exit code 1 where they do not. It goes with --seed and flags of device, precision and "
            "implementation."
        ),
    )


class TrainerArguments(TrainingArguments):
    """`TrainingArguments` under a heading of their own."""

    _argument_group_name = "training (transformers.TrainingArguments)"

    def __post_init__(self) -> None:
        # Every metric is a loss here, whether its name ends in "loss" or not.
        self.greater_is_better = bool(self.greater_is_better)
        super().__post_init__()  # type: ignore[no-untyped-call]
