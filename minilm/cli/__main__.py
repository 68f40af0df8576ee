"""`python -m minilm.cli`, and `torchrun --nproc_per_node N -m minilm.cli`."""

import sys

from minilm.cli import main

if __name__ == "__main__":
    sys.exit(main())
