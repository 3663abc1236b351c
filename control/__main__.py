"""`python -m control` is `meshctl`."""

import sys

from control.cli import main

sys.exit(main())
