"""Name maps, one file for each component."""
