"""`python -m jaxsd` is `jaxsd`."""

from jaxsd.cli import main

main()
