"""What makes the documentation: pages from the parsers, the public names and the notebooks."""
