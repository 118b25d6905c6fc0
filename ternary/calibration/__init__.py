"""Block-by-block calibration: one block on the device at a time."""
