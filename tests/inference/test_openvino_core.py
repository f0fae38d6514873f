"""OpenVINO in this process: signals still arrive, and nothing is sent or left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SIGNALLED = """
import faulthandler, gc, os, signal, sys, threading
from canopy.inference.backends import settle
from canopy.models.registry import load_model

def open_one(kept):
    model = load_model(sys.argv[1])
    kept.append(settle(model, "openvino").open(model))

faulthandler.enable()  # a signal stack that somebody else must not lose
open_one(kept := [])
open_one(kept)
threads = [threading.Thread(target=kept.pop, args=(0,)), threading.Thread(target=open_one, args=(kept,))]
for thread in threads:
    thread.start()
    thread.join()
kept.clear()
gc.collect()
told = []
signal.signal(signal.SIGUSR1, lambda *_: told.append("arrived"))
os.kill(os.getpid(), signal.SIGUSR1)
print(*told, "openvino_telemetry.main" in sys.modules, len(threading.enumerate()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals of Unix")
def test_signals_arrive_after_runners_came_and_went_and_nothing_is_sent(saved, tmp_path: Path) -> None:
    env = {**os.environ, "HOME": str(tmp_path), "CANOPY_CACHE": str(tmp_path / "cache")}
    env.pop("CI", None)  # OpenVINO's telemetry spares what says it is CI
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED, str(saved("cnn").path)],
        capture_output=True,
        text=True,
        env=env,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["arrived", "False", "1"]
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
