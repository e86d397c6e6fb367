"""`python -m tiltlm`, which torchrun starts several times: `torchrun --nproc-per-node 2 -m tiltlm run …`."""

import sys

from tiltlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
