"""What `sample.py` does with its options: opens the model, draws from prompts or from a file."""
