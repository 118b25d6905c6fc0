"""A distillation run as one self-contained HTML page."""
