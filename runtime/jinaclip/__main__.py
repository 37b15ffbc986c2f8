"""python -m jinaclip"""

import sys

from jinaclip.cli import main

sys.exit(main())
