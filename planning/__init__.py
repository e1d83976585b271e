"""Compiling ahead of time, for machines that are not attached."""
