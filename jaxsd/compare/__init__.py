"""A model here and in PyTorch (diffusers, transformers), held against each other block by block.

    report = jaxsd.compare.compare("path/to/model")       # needs pip install "jaxsd[torch]"
    report.agrees, report.departures

Both sides read the same weights and get the same seeded inputs. `blocks` looks inside our modules,
`reference` inside PyTorch's, `inputs` says what each network is fed, `trajectory` samples.
"""

from jaxsd.compare.model import compare
from jaxsd.compare.report import Report, Tolerance
from jaxsd.compare.trajectory import Sampled

__all__ = ["Report", "Sampled", "Tolerance", "compare"]
