"""`python -m hf_flash_patch` is `hfp`."""

import sys

from .cli import main

sys.exit(main())
