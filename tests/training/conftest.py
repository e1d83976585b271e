"""Lets the tests of this folder, and the processes they start, import `tiny_training`."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
