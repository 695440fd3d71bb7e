"""What benchmarks/beside.py says of two sides that worked in turns; sides made up here."""

import beside
import pytest

OURS = {"fastest": None, "flops": 6e12, "device": "cpu", "import": 1.0, "load": 2.0, "first": 3.0}
PEERS = {"fastest": 2e12, "flops": None, "device": "cpu", "import": 2.0, "load": 1.0, "first": 1.5}


class Side:
    """What a process would say, without one."""

    seconds_of = {"jaxsd": [4.0, 5.0, 30.0], "eager": [8.0, 8.0, 8.0]}
    memory_of = {"jaxsd": 6_000_000_000, "eager": 8_000_000_000}

    def __init__(self, name, work, environment):
        self.name, self.out, self.seconds, self.memory = name, work.out, [], 0
        self.start = OURS if name == "jaxsd" else PEERS

    def begin(self):
        pass

    def once(self):
        self.seconds.append(self.seconds_of[self.name][len(self.seconds)])

    def end(self):
        self.memory = self.memory_of[self.name]

    def kill(self):
        pass


@pytest.fixture
def row(monkeypatch, tmp_path):
    monkeypatch.setattr(beside, "Side", Side)
    options = beside.Options(rounds=3)
    (found,) = beside.measure(options, "model", "image", 1, tmp_path)
    return found


def test_ratios_are_of_turns_and_their_middle_counts(row):
    assert row["ratio"] == [5 / 8, 4 / 8, 30 / 8]
    assert row["seconds"] == {"jaxsd": 5.0, "eager": 8.0}


def test_a_cpu_s_peak_is_the_peer_s_product(row):
    """Six TFLOP in the middle one of our turns, five seconds, where two a second are the most."""
    assert row["share_of_peak"] == pytest.approx(6 / 5 / 2)
    assert "| 60% |" in beside.line(row)


def test_a_device_s_peak_is_its_maker_s(monkeypatch, row, tmp_path):
    monkeypatch.setitem(OURS, "fastest", 4e12)
    (found,) = beside.measure(beside.Options(rounds=3), "model", "image", 1, tmp_path)
    assert found["share_of_peak"] == pytest.approx(6 / 5 / 4)


def test_tables_have_a_cell_for_each_title(row):
    for table in (f"{beside.heading('cpu')}\n{beside.line(row)}", beside.absolute([row])):
        widths = {line.count(" | ") + line.count(" |\n") for line in table.splitlines()}
        assert len(widths) == 1, table
    assert "| image, eager | 1 | 5.000 | 8.000 | 0.20 | 1.20 | 6.00 |" in beside.absolute([row])


@pytest.mark.parametrize("cold", [True, False])
def test_programs_are_those_that_the_commands_compiled(cold, tmp_path, monkeypatch):
    """Or, cold, none."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    told = []

    def side(name, work, environment):
        told.append(environment["JAX_COMPILATION_CACHE_DIR"])
        raise InterruptedError

    monkeypatch.setattr(beside, "Side", side)
    with pytest.raises(InterruptedError):
        beside.measure(beside.Options(cold=cold), "model", "unet", 1, tmp_path)
    assert told == [str(tmp_path / ("programs" if cold else "cache/jaxsd/programs"))]
