"""Reading and writing checkpoints of other ecosystems: name maps, streaming, verification."""
