"""`python -m equipoise` does what `equipoise` does."""

import sys

from equipoise.cli import main

sys.exit(main())
