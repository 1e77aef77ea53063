"""`python _confined ORDER`. Only this file is compiled at every start, so it holds nothing."""

import sys

import keeper

if __name__ == "__main__":
    sys.exit(keeper.main())
