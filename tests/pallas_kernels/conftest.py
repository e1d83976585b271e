"""Lets these tests use the helpers of the ops' tests."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "ops"))
