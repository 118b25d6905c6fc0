"""The drawn world, its exact detector and the composition score in GenEval's six categories."""
