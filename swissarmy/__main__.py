"""`python -m swissarmy` is `sat`."""

import sys

from swissarmy.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
