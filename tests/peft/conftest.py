"""Small published models are shared with the tests of loading them."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "model"))
