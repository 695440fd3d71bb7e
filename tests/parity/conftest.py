"""What the parity tests have in common besides `torch_reference`."""

import pytest

# Full-size models are held to 1e-4; the errors of tiny ones are near 1e-6.
TOLERANCE = 1e-5


@pytest.fixture
def report(record_property):
    """Holds an error to the tolerance, and puts it on record."""

    def check(error, tolerance=TOLERANCE):
        print(f"relative error {error:.1e}")
        record_property("relative_error", error)
        assert error <= tolerance

    return check
