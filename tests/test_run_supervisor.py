"""The supervisor of `steerbridge run`: events, metrics, logs, exit codes."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("elftools", reason="needs the extra `run`")
import helpers
import servers
from steerbridge_run import preload, supervisor


def test_events_are_logged_and_counted(tmp_path, capsys):
    log, metrics = io.StringIO(), supervisor.Metrics()
    listener = supervisor.Supervisor(tmp_path / "events", log, metrics)
    verdict = {
        "event": "verdict",
        "pid": 7,
        "fired": ["refuse"],
        "probes": [{"probe": "p", "score": 0.9}, {"probe": "q", "score": None}],
    }
    lines = [{"event": "active", "pid": 7, "model": "m"}, verdict, {"event": "refused", "pid": 7}]
    with socket.socket(socket.AF_UNIX) as sender:
        sender.connect(str(tmp_path / "events"))
        sender.sendall("".join(json.dumps(line) + "\n" for line in lines).encode())
        sender.sendall(b'{"event": "verd')  # killed within a line
    while log.getvalue().count("\n") < 3:
        time.sleep(0.01)
    listener.close()
    assert helpers.json_lines(log.getvalue()) == lines
    assert listener.active == 1
    assert "active in process 7: m" in capsys.readouterr().err
    port = servers.free_port()
    metrics.serve(port)
    text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    assert 'steerbridge_verdicts_total{fired="true"} 1.0' in text
    assert 'steerbridge_rules_fired_total{rule="refuse"} 1.0' in text
    assert 'steerbridge_stopped_total{event="refused"} 1.0' in text


def test_the_log_may_be_a_socket_and_may_fail(tmp_path, capsys):
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "log"))
        listening.listen()
        log = supervisor.open_log(f"unix:{tmp_path / 'log'}")
        taken, _ = listening.accept()
    metrics = supervisor.Metrics()
    listener = supervisor.Supervisor(tmp_path / "events", log, metrics)
    with socket.socket(socket.AF_UNIX) as sender, taken.makefile("r") as lines:
        sender.connect(str(tmp_path / "events"))
        sender.sendall(b'{"event": "refused", "pid": 1}\n')
        assert json.loads(lines.readline()) == {"event": "refused", "pid": 1}
        taken.close()
        lines.close()
        for _ in range(3):  # what is written after the other side has gone
            sender.sendall(b'{"event": "refused", "pid": 2}\n')
    listener.close()
    assert metrics.registry.get_sample_value("steerbridge_stopped_total", {"event": "refused"}) == 4
    assert "the log is given up" in capsys.readouterr().err


def test_events_of_a_program_that_ended_at_once_are_read(tmp_path):
    for turn in range(50):
        metrics = supervisor.Metrics()
        listener = supervisor.Supervisor(tmp_path / str(turn), None, metrics)
        for _ in range(5):
            with socket.socket(socket.AF_UNIX) as sender:
                sender.connect(str(tmp_path / str(turn)))
                sender.sendall(b'{"event": "refused", "pid": 1}\n')
        listener.close()
        counted = metrics.registry.get_sample_value(
            "steerbridge_stopped_total", {"event": "refused"}
        )
        assert counted == 5


EVENT = """
#include "events.h"
int main(void) {
    sb_event event;
    sb_event_begin(&event, "verdict");
    sb_event_open(&event, "probes", '[');
    for (int i = 0; i < 500; i++) {
        sb_event_open(&event, 0, '{');
        sb_event_text(&event, "probe", "a name with \\"quotes\\" %d", i);
        sb_event_number(&event, "score", 0.5);
        sb_event_close(&event, '}');
    }
    sb_event_close(&event, ']');
    sb_event_send(&event);
    return 0;
}
"""


@pytest.mark.native
def test_a_line_that_is_too_long_is_cut_between_fields(tmp_path):
    native = Path(preload.__file__).parent / "native"
    source = f'#include "{native}/events.c"\n{EVENT}'
    program = helpers.compiled(
        tmp_path, source, f"-I{native}", "-g", "-fsanitize=address,undefined"
    )
    sink = tmp_path / "events.jsonl"
    environment = {**os.environ, "STEERBRIDGE_EVENTS": str(sink)}
    subprocess.run([program], env=environment, check=True)
    probes = json.loads(sink.read_text())["probes"]
    assert 50 < len(probes) < 500
    assert all(probe["score"] == 0.5 for probe in probes[:-1])


def test_exit_codes_and_signals_are_the_programs_own():
    assert supervisor.run([sys.executable, "-c", "raise SystemExit(3)"], os.environ) == 3
    kill = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert supervisor.run([sys.executable, "-c", kill], os.environ) == 128 + 9
