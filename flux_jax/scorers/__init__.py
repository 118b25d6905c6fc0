"""Pictures for the official scorers of GenEval, T2I-CompBench and DPG-Bench."""
