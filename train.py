"""Trains a model: `python train.py RECIPE --help`."""

from jaxsd.cli import run_command

if __name__ == "__main__":
    run_command("train")
