"""`python -m nemo_longctx`, and under torchrun `torchrun --nproc-per-node 8 -m nemo_longctx train recipe=...`."""

import sys

from nemo_longctx.cli import main

if __name__ == "__main__":
    sys.exit(main())
