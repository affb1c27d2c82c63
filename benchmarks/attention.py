"""`hfp bench` from a checkout: PYTHONPATH=. python benchmarks/attention.py --help"""

import sys

from hf_flash_patch.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
