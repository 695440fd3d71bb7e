"""The recipes of `train.py`, one file each: options in, an objective and its batches out."""
