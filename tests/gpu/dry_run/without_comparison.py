"""jinaclip's command line whose self-test compares nothing: over the stand-in for CUDA no value is computed. The
self-test still runs its batches and looks at what comes back for form.

    python -m tests.gpu.dry_run.without_comparison serve BUNDLE --device cuda
"""

from __future__ import annotations

import math
import sys

from jinaclip.backends import self_test as selftest
from jinaclip.cli import main

UNBOUNDED = dict.fromkeys(selftest.TOLERANCE, math.inf)

if __name__ == "__main__":
    selftest.TOLERANCE = UNBOUNDED
    sys.exit(main())
