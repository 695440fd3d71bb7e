"""`jaxsd serve` from its start to its end."""

import dataclasses
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import tyro
from test_cli import cache, call  # noqa: F401

from jaxsd.cli import serve
from jaxsd.serving import schema, server


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--max-steps", "0"], "max_steps must be at least 1, not 0"),
        (["--batch-size", "0"], "batch_size must be at least 1, not 0"),
        (["--timeout", "0"], "timeout must be above 0, not 0"),
        (["--controlnet", "x"], "a ControlNet needs pictures"),
        (["--size", "large"], "size must be WIDTHxHEIGHT, such as 512x512"),
        (["--port", "0", "--size", "33x32"], "height and width must be multiples of"),
        (["--port", "0", "--model", "nothing"], "unknown model 'nothing'"),
        (["--port", "0", "--beside", "nothing"], "unknown model 'nothing'"),
        (
            ["--port", "0", "--beside", "digits-ddpm-1step"],
            "digits-ddpm-1step draws 8x8 and digits 32x32",
        ),
        (["--port", "0", "--beside", "digits"], "digits is served already: name it once"),
        (["--port", "0", "--preview-with", "nowhere"], "nowhere"),
        (["--host", "nowhere.invalid"], "cannot listen on nowhere.invalid port 7860"),
        (["--host-name", "https://a.example"], "host_name is one such as pictures.example.org"),
        (["--port", "99999"], "port must be from 0 (any that is free) to 65535, not 99999"),
    ],
)
def test_what_cannot_be_served(capsys, monkeypatch, arguments, said):
    monkeypatch.setattr(server, "serve", pytest.fail)
    status, _, err = call(capsys, "serve", *arguments)
    assert status == 2 and said in err and err.count("\n") == 1


def test_a_port_in_use_is_known_before_a_model_is_loaded(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, err = call(capsys, "serve", "--port", port, "--model", "nothing")
    assert status == 2 and f"cannot listen on 127.0.0.1 port {port}: Address already in use" in err


@pytest.mark.parametrize("missing", ["gradio", "uvicorn"])
def test_without_the_extra(missing):
    code = f"""
import sys
sys.modules[{missing!r}] = None
from jaxsd.cli import run_command
run_command("serve", [])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr == 'error: serve needs Gradio: pip install "jaxsd[serve]"\n'


SHOWN = (Path(__file__).parent.parent / "docs" / "serve.md").read_text(encoding="utf-8")


def test_the_commands_of_the_page_in_the_docs_are_understood(capsys, monkeypatch):
    lines = [line for line in SHOWN.splitlines() if line.startswith("jaxsd serve")]
    assert len(lines) == 5
    for line in lines:
        options = tyro.cli(serve.Options, args=shlex.split(line)[2:])
        assert options.host == "127.0.0.1"
    options = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(serve.Options)}
    assert set(re.findall(r"`(--[a-z-]+)", SHOWN)) <= options


def test_the_requests_of_the_page_in_the_docs_are_understood():
    (body,) = re.findall(r"-d '(.*)'", SHOWN)
    assert schema.parse(body.encode()).n == 2
    (sent,) = re.findall(r"images\.generate(\(.*?\n\))", SHOWN, re.DOTALL)
    said = eval(f"dict{sent}")
    assert schema.parse(json.dumps(said | said.pop("extra_body")).encode()).seed == 3
    fields = {name for row in re.findall(r"^\| (`.*?`) \|", SHOWN, re.M)
              for name in re.findall(r"`(\w+)`", row)}  # fmt: skip
    assert fields == set(schema.Body.model_fields)


def test_it_listens_on_this_machine_alone():
    with server.listen("127.0.0.1", 0) as bound:
        assert server.address(bound) == f"http://127.0.0.1:{bound.getsockname()[1]}"
    with server.listen("::1", 0) as bound:
        assert server.address(bound).startswith("http://[::1]:")


def test_names_that_are_its_own():
    with server.listen("127.0.0.1", 0) as here, server.listen("0.0.0.0", 0) as everywhere:
        assert server.own_names(here, ()) == {"localhost"}
        assert server.own_names(here, ["A.example"]) == {"localhost", "a.example"}
        assert server.own_names(everywhere, ()) is None
        assert server.own_names(everywhere, ["a.example"]) == {"localhost", "a.example"}


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
def test_the_end_answers_what_is_being_drawn(sign):
    command = [sys.executable, "-m", "jaxsd", "serve", "--alone", "--port", "0", "--max-steps"]
    started = subprocess.Popen(
        [*command, "300", "--batch-size", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    try:
        assert started.stdout is not None
        lines = [started.stdout.readline(), started.stdout.readline()]
        assert lines[0].startswith("digits: compiling for 1 pictures at a time")
        site = lines[1].partition(" ")[0]
        with httpx.Client(base_url=site, timeout=300) as client, ThreadPoolExecutor() as pool:

            def ask(steps):
                body = {"prompt": "a red seven", "seed": 1, "steps": steps}
                return client.post("/v1/images/generations", json=body)

            assert "gradio" in client.get("/").text  # the page
            running = pool.submit(ask, 300)
            while not client.get("/health").json()["drawing"]:
                pass
            waiting = pool.submit(ask, 2)
            while not client.get("/health").json()["waiting"]:
                assert not running.done()
            started.send_signal(sign)
            assert waiting.result().status_code == 503
            assert "the server is stopping" in waiting.result().json()["error"]["message"]
            assert running.result().status_code == 200
        assert started.wait(60) == 0
        assert started.stderr is not None and not started.stderr.read()
    finally:
        started.kill()
        started.communicate()
