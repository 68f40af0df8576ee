"""What is compared: systems, starts and students; a cell is a model made of them with one seed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

LAYERS, ENDS, RANDOM, SLICE, PCA = "layers 2, 4, 6", "layers 1, 3, 6", "random", "slice", "pca"
STARTS = {
    LAYERS: ("--student_init_layers", "2,4,6"),
    ENDS: ("--student_init_layers", "1,3,6"),
    RANDOM: ("--student_init", "random"),
    SLICE: ("--student_init", "slice"),
    PCA: ("--student_init", "pca"),
}
WHOLE, HALF, FEWER = "3x384", "3x192", "3x192, 6 heads"


class Student(NamedTuple):
    """Of the teacher's sizes where nothing else is said."""

    num_layers: int = 3
    hidden_size: int | None = None
    num_heads: int | None = None

    @property
    def flags(self) -> tuple[str, ...]:
        """Of minilm-train."""
        return tuple(str(word) for name, size in self._asdict().items() if size for word in (f"--student_{name}", size))


STUDENTS = {WHOLE: Student(), HALF: Student(hidden_size=192), FEWER: Student(hidden_size=192, num_heads=6)}
EVERY_LAYER = ("--layer_map", "1:2,2:4,3:6")
# Nothing of the teacher stands in a random layer: it takes longer steps.
LEARNING_RATES = {LAYERS: "2e-4", ENDS: "2e-4", RANDOM: "1e-3", SLICE: "1e-3", PCA: "1e-3"}

Way = Literal["train", "sentence-transformers", "untrained", "embeddings", "teacher"]


class System(NamedTuple):
    """How a model comes about."""

    flags: tuple[str, ...] = ()  # of minilm-train; of sentence-transformers the distance alone
    head: bool = False  # whether the teacher comes with its masked-LM head
    way: Way = "train"
    bf16: bool = True


TEACHER, EMBEDDINGS, UNTRAINED = "teacher", "embeddings, no layers", "untrained"
SYSTEMS: dict[str, System] = {
    TEACHER: System(way="teacher"),
    EMBEDDINGS: System(way="embeddings"),
    UNTRAINED: System(way="untrained"),
    "mlm": System(("--objective", "mlm"), head=True),
    "mlm-kd": System(("--objective", "mlm-kd"), head=True),
    "distilbert": System(("--objective", "distilbert"), head=True),
    "tinybert": System(("--objective", "tinybert")),
    "mobilebert": System(("--objective", "mobilebert", *EVERY_LAYER), head=True),
    "minilm, qk alone": System(("--relations", "qk")),
    "minilm": System(),
    "minilm-v2": System(("--objective", "minilm-v2")),
    "minilm, layer to layer": System(EVERY_LAYER),
    "minilm, assistant 6x192": System(("--assistant_num_layers", "6", "--assistant_hidden_size", "192")),
    "minilm + output": System(("--output_weight", "1"), head=True),
    "minilm-v2 + embedding": System(("--objective", "minilm-v2", "--embedding_weight", "1")),
    "minilm + embedding": System(("--embedding_weight", "1")),
    "embedding": System(("--objective", "embedding")),
    "sentence-transformers, cosine": System(("cosine",), way="sentence-transformers"),
    "sentence-transformers, mse": System(("mse",), way="sentence-transformers"),
    "minilm, fp32": System(bf16=False),
    "minilm, fp32, reference": System(("--implementation", "reference"), bf16=False),
}
CONTROLS = (TEACHER, EMBEDDINGS, UNTRAINED)


@dataclass(frozen=True)
class Cell:
    """One model."""

    system: str
    student: str
    start: str
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        words = f"{self.system} {self.student} {self.start} {self.steps} {self.seed}"
        return "_".join("".join(c if c.isalnum() or c == "-" else " " for c in words).split())


class Comparison(NamedTuple):
    """A table: lines that differ in one thing."""

    title: str
    lines: tuple[tuple[str, str, str, int], ...]  # system, student, start, steps

    def cells(self, seeds: Sequence[int]) -> Iterator[Cell]:
        """Seed by seed, so that a loop that is stopped early has done every line as often; the same model once."""
        for seed in seeds:
            for system, student, start, steps in self.lines:
                drawn = SYSTEMS[system].way == "train" or SYSTEMS[system].way == "sentence-transformers"
                if drawn or start in (RANDOM, PCA) or seed == seeds[0]:
                    yield Cell(system, student, start, steps, seed)


def _systems(steps: int) -> tuple[tuple[str, str, str, int], ...]:
    trained = [name for name in SYSTEMS if name not in (*CONTROLS, "minilm, assistant 6x192", "minilm-v2 + embedding")]
    controls = ((TEACHER, "6x384", "", 0), (EMBEDDINGS, "0x384", "", 0))
    starts = ((UNTRAINED, WHOLE, RANDOM, 0), (UNTRAINED, WHOLE, LAYERS, 0))
    return (*controls, *starts, *((name, WHOLE, LAYERS, steps) for name in trained))


_EXTRAS = ("minilm", "minilm + embedding", "minilm + output", "embedding")
COMPARISONS: dict[str, Comparison] = {
    "systems": Comparison("The systems, on equal terms", _systems(300)),
    "width": Comparison(
        "A student of half the width",
        (
            *((UNTRAINED, HALF, start, 0) for start in (SLICE, PCA, RANDOM)),
            *((name, HALF, start, 300) for start in (SLICE, PCA) for name in _EXTRAS),
            *((name, HALF, RANDOM, 300) for name in ("minilm", "minilm, assistant 6x192", "minilm + embedding")),
        ),
    ),
    "heads": Comparison(
        "A student of half the width and heads",
        (
            *((UNTRAINED, FEWER, start, 0) for start in (SLICE, PCA)),
            *((f"minilm-v2{extra}", FEWER, start, 300) for start in (SLICE, PCA) for extra in ("", " + embedding")),
        ),
    ),
    "starts": Comparison(
        "What to start from, and for how long",
        (
            *((UNTRAINED, WHOLE, start, 0) for start in (RANDOM, LAYERS, ENDS)),
            *(
                (name, WHOLE, start, steps)
                for steps in (300, 1000, 5000)
                for name in ("minilm", "minilm + embedding")
                for start in (LAYERS, ENDS, RANDOM)
            ),
        ),
    ),
}
QUICK = Comparison(
    "Ten minutes on a CPU",
    (
        *_systems(60)[:4],
        *((name, WHOLE, LAYERS, 60) for name in ("tinybert", "minilm", "minilm-v2", "minilm + embedding", "embedding")),
    ),
)
