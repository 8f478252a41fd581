"""The process that looks at an upload."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from app.service import intake
from app.service.refusals import RefusedError


def test_stopping_the_service_stops_the_check_of_an_upload(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 60\n", encoding="utf-8")
    slow.chmod(0o700)
    monkeypatch.setattr("app.service.intake.sys.executable", str(slow))
    refused: list[int] = []

    def look() -> None:
        try:
            intake.look_at(tmp_path, [], 1)
        except RefusedError as error:
            refused.append(error.status)

    thread = threading.Thread(target=look)
    thread.start()
    while not intake._looks and thread.is_alive():
        time.sleep(0.01)
    intake.stop_looks()
    thread.join(20)
    assert refused == [503]
