"""The command `tilescan`."""
