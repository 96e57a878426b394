"""`python -m nvfp4_titan.train`, or under torchrun: see nvfp4_titan.titan.launcher."""

import sys

from nvfp4_titan.titan.launcher import main

if __name__ == "__main__":
    sys.exit(main())
