"""Kinds of measurement that several papers use."""
