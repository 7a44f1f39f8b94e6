"""Where things are in the checkout."""

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
SUPPORT = TESTS / "support"
WORKERS = SUPPORT / "workers"
# For processes of their own: the package and the helpers of the tests.
PYTHONPATH = os.pathsep.join(map(str, (ROOT, SUPPORT, WORKERS)))
