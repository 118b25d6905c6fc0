"""End-to-end self-distillation: trajectories, the training step, and runs of it."""
