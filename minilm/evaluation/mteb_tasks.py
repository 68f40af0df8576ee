"""Tasks of MTEB, named mteb:NAME: mteb gets their data, learns and scores, as it does for its leaderboard."""

from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from statistics import fmean
from typing import Any

from minilm.errors import UsageError
from minilm.evaluation.encoders import Encoder
from minilm.evaluation.tasks import Scores

PREFIX = "mteb:"


@dataclass(frozen=True)
class MtebTask:
    """One of mteb's own, an `AbsTask`."""

    task: Any

    @property
    def name(self) -> str:
        """In the table."""
        return f"{PREFIX}{self.task.metadata.name}"

    @property
    def identity(self) -> dict[str, Any]:
        """Which data it reads, and what scores it; JSON-able."""
        data = self.task.metadata.dataset
        return {"data": data["path"], "revision": data["revision"], "mteb": version("mteb")}

    def scores(self, encoder: Encoder) -> Scores:
        """The main score of each split, the mean over the task's subsets; raises what mteb does, `OSError` for data."""
        import mteb

        result = mteb.evaluate(encoder.loaded, self.task, cache=None, co2_tracker=False, show_progress_bar=False)
        name = self.task.metadata.main_score
        return {
            split: {name: 100 * fmean(subset["main_score"] for subset in subsets)}
            for split, subsets in result.task_results[0].scores.items()
        }


def find_mteb_task(name: str) -> MtebTask:
    """Of "mteb:NAME".

    Raises:
        ModuleNotFoundError: mteb is not installed.
        UsageError: it has no such task.
    """
    if find_spec("mteb") is None:
        raise ModuleNotFoundError(f"the task {name!r} needs mteb, which is not installed: pip install mteb")
    import mteb

    try:
        return MtebTask(mteb.get_task(name.removeprefix(PREFIX)))
    except KeyError as error:
        raise UsageError(f"mteb has no such task: {str(error.args[0]).removeprefix('KeyError: ')}") from error
