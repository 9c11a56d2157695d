"""`python -m resona_ext`: see resona_ext/cli."""

import sys

from .cli import main

sys.exit(main())
