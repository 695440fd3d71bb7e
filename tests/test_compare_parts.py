"""What `jaxsd compare` is made of, without PyTorch: watching blocks, measures and tolerances."""

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxsd.compare.blocks import outline, watch
from jaxsd.compare.inputs import FED
from jaxsd.compare.report import Error, Report, Row, Section, Tolerance, make_row
from jaxsd.components import COMPONENTS
from jaxsd.nn import Linear, Net


class Two(nnx.Module):
    def __init__(self):
        self.items = nnx.List([Linear(2, 2), Linear(2, 2)])
        self.last = Linear(2, 3)

    def __call__(self, x):
        for item in self.items:
            x = item(x)
        return self.last(x)


def test_watching_sees_and_replaces():
    net = Net(Two())
    params = {name: jnp.ones(shape) for name, shape in net.shapes.items()}
    seen = []

    def see(name, output):
        seen.append(name)
        return jnp.zeros_like(output) if name == "items.1" else output

    module = watch(net.bind(params), see)
    np.testing.assert_array_equal(module(jnp.ones((1, 2))), jnp.ones((1, 3)))  # last's bias alone
    assert seen == ["items.0", "items.1", "last"]
    # Other modules of the class, and later calls of the net, are as they were.
    np.testing.assert_array_equal(net(params, jnp.ones((1, 2))), jnp.full((1, 3), 15.0))
    assert seen == ["items.0", "items.1", "last"]


def test_a_component_has_a_row_in_the_table():
    assert {config for kinds in COMPONENTS.values() for config, _ in kinds.values()} <= set(FED)


def test_outline_is_in_the_order_of_execution():
    shapes = outline(Net(Two()), lambda m, x: m(x["x"]), {"x": np.ones((5, 2), np.float32)})
    assert shapes == {"items.0": (5, 2), "items.1": (5, 2), "last": (5, 3)}


def test_the_measure_in_bfloat16():
    exact = np.array([3.0, 4.0, 0.0, 0.0], np.float32)
    same, ours = exact + np.float32(0.125), exact - np.float32(0.25)
    errors = [Error.of(ours - same), Error.of(ours - exact)]
    row = make_row("a", "bfloat16", errors, same, exact)
    assert row == Row("a", 0.375, 0.375 / 4.125, None, 0.1, 0.05)  # rms of exact: 2.5
    assert make_row("a", "float32", errors, same, same).relative == 0.375 / 4.125
    zero = np.zeros(4, np.float32)
    assert make_row("a", "float32", [Error.of(zero)], zero, zero).relative == 0
    assert make_row("a", "float32", errors, zero, zero).departs(Tolerance())


def test_tolerances_hold_at_their_edge():
    tolerance = Tolerance()
    assert not Row("a", 1.0, 1e-4, 2e-5).departs(tolerance)
    assert Row("a", 1.0, 1.01e-4, 0.0).departs(tolerance)
    assert Row("a", 1.0, 0.0, 2.01e-5).departs_alone(tolerance)
    assert Row("a", 1.0, float("nan"), 0.0).departs(tolerance)
    assert Row("a", 1.0, 0.0, float("nan")).departs_alone(tolerance)
    half = 2.0**-8
    assert not Row("a", 1.0, 9.0, None, half + 0.02, 0.01).departs(tolerance)
    assert Row("a", 1.0, 9.0, None, half + 0.021, 0.01).departs(tolerance)
    # The first that is wrong by itself comes before the first that drifts off.
    rows = [Row("drifts", 1.0, 1.0, 0.0), Row("wrong", 1.0, 1.0, 1.0), Row("after", 1.0, 1.0, 1.0)]
    assert Section("s", "", {"float32": rows}).first_departing("float32", tolerance) == rows[1]


def test_what_is_not_finite_is_null_in_json_and_departs():
    rows = [Row("a", float("nan"), float("inf"), 0.0), Row("b", 0.0, 0.0, 0.0)]
    report = Report("m", "m", Tolerance(), [Section("unet", "", {"float32": rows})])
    said = report.to_json()
    assert not report.agrees and not said["agrees"]
    section = said["sections"]["unet"]["float32"]
    assert section["first_departing"] == "a" and section["worst_relative"] is None
    assert section["blocks"][0]["absolute"] is None and section["blocks"][0]["relative"] is None
    assert report.to_text().endswith(
        "worst relative error inf, of a block alone 0.0e+00; DEPARTS first at a"
    )
