"""Lets these tests share their table of ops."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
