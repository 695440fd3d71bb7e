"""`report.html` of a training's folder: what it was, how it went, how to go on.

One file that needs no server. It is made of what the folder holds, and knows nothing of the
training itself: of one that runs, was killed or has ended.
"""

from jaxsd.run_report.page import FILE, write
from jaxsd.run_report.reading import write_stages

__all__ = ["FILE", "write", "write_stages"]
