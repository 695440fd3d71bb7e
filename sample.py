"""Makes pictures from prompts: `python sample.py --help`."""

from jaxsd.cli import run_command

if __name__ == "__main__":
    run_command("sample")
