"""The command line: `minilm-train`, and `python -m minilm.cli` for launchers."""

from minilm.cli.train import main as main
