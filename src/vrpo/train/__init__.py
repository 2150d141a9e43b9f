"""The training loop and what it stands on; `train.loop` is the place to start reading."""
