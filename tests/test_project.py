"""The project's papers say what pyproject.toml and .ci/run say."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def values(file: str, key: str) -> list[str]:
    """What stands behind `key:` in a YAML file, in order."""
    return re.findall(rf"^ *{key}: (.*)$", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_citation_is_of_this_version_and_licence() -> None:
    assert values("CITATION.cff", "version") == [PROJECT["version"]]
    assert values("CITATION.cff", "license") == [PROJECT["license"]]


def test_before_a_commit_runs_what_continuous_integration_runs() -> None:
    """With the tools of the environment, whose versions the `dev` extra pins."""
    commands = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    tools = set()
    for entry in values(".pre-commit-config.yaml", "entry"):
        assert any(command.startswith(entry) for command in commands), entry
        tools.add(entry.split()[0])
    assert set(values(".pre-commit-config.yaml", "language")) == {"system"}
    assert tools == {"ruff", "mypy"}
    pinned = PROJECT["optional-dependencies"]["dev"]
    assert {package.partition("==")[0] for package in pinned if "==" in package} == tools
