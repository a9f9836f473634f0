"""``python -m lcnn_utils`` is the command ``lcnn``."""

import sys

from .cli import main

sys.exit(main())
