"""Time against density, and the paper's long sparse shapes, from a checkout:
PYTHONPATH=. python benchmarks/block_sparse.py --help"""

import sys

from hf_flash_patch.cli import main

CELLS = ["--cells", "blocks", "density", "long_sparse"]

if __name__ == "__main__":
    sys.exit(main(["bench", *CELLS, *sys.argv[1:]]))
