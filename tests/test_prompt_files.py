"""Files of prompts: what a line may say, and how one that says something else is named."""

import pytest
from test_cli import cache, refused  # noqa: F401

from jaxsd.errors import JaxsdError
from jaxsd.prompt_files import Line, read_lines, scan


def test_lines_are_prompts_or_objects(tmp_path):
    file = tmp_path / "a.txt"
    lines = ["\ufeffa red seven ", '{"prompt": "", "negative_prompt": "blue"}\r']
    file.write_bytes("\n".join([*lines, '{"prompt": "x", "seed": 3}']).encode())
    assert [*read_lines(file)] == [
        Line(0, "a red seven"),
        Line(1, "", None, "blue"),
        Line(2, "x", 3),
    ]


@pytest.mark.parametrize(
    "text, said",
    [
        ("", "is empty"),
        ("seven\n\nthree\n", "line 2 is blank"),
        ("seven\n \t\n", "line 2 is blank"),
        ('seven\n{"prompt": "three"\n', "line 2 is not valid JSON"),
        ('{"seed": 3}', 'line 1 must be an object with a "prompt"'),
        ('{"prompt": 7}', 'line 1 must be an object with a "prompt"'),
        ('{"prompt": "a", "sed": 7}', "line 1 says 'sed': it may say prompt, seed"),
        ('{"prompt": "a", "seed": -1}', "line 1: seed must be a whole number from 0"),
        ('{"prompt": "a", "seed": true}', "line 1: seed must be a whole number from 0"),
        ('{"prompt": "a", "seed": 4294967296}', "line 1: seed must be a whole number from 0"),
        ('{"prompt": "a", "negative_prompt": 1}', "line 1: negative_prompt must be text"),
        ('{"prompt": "\\ud800"}', "line 1 is not Unicode text"),
        (b"seven\n\xff\xfe\n", "line 2 is not UTF-8 text"),
        ("a" * 1_000_001, "line 1 is longer than"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(text, said, tmp_path, capsys):
    file = tmp_path / "a.txt"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    line = refused(capsys, "sample", "--prompts-file", file, "--out", tmp_path / "out")
    assert said in line and str(file) in line
    assert not list((tmp_path / "out").iterdir())


def test_every_line_of_json_lines_is_an_object(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "a"}\nseven\n')
    with pytest.raises(JaxsdError, match="line 2 is not valid JSON"):
        list(read_lines(file))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(JaxsdError, match="does not exist"):
        scan(tmp_path / "a.txt")
    with pytest.raises(JaxsdError, match="is no file of prompts"):
        scan(tmp_path)


def test_a_scan_knows_the_beginning(tmp_path):
    file, longer = tmp_path / "a.txt", tmp_path / "b.txt"
    file.write_text("one\ntwo\n")
    longer.write_text('one \n{"prompt": "two"}\nthree\n')  # the same is said
    assert scan(longer, 2).start == scan(file).digest == scan(file, 2).start
    assert scan(file, 3).start is None
    assert scan(file).digest != scan(longer).digest
