"""Name the machine: what the system tells of its processor, or what the platform does."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import pytest

from outgrow.model.base.machine import cores, machine, processor

CPUINFO = "processor\t: 0\nmodel name\t: Two Cores: the second\nprocessor\t: 1\nmodel name\t: another\n"


@pytest.mark.parametrize(
    ("cpuinfo", "known", "name"),
    [
        (CPUINFO, "x86_64", "Two Cores: the second"),
        ("processor\t: 0\n", "aarch64", "aarch64"),  # Linux names no model of an ARM processor
        (None, "arm", "arm"),  # macOS
        (None, "", "cpu"),
    ],
)
def test_a_processor_has_a_name_on_every_system(
    cpuinfo: str | None, known: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_text(path: Path) -> str:
        assert path == Path("/proc/cpuinfo")
        if cpuinfo is None:
            raise FileNotFoundError(path)
        return cpuinfo

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(platform, "processor", lambda: known)
    assert processor() == name


def test_the_machine_is_told_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outgrow.model.base.machine.processor", lambda: "a processor")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert cores() == 3
    assert machine() == f"a processor, 3 cores, {platform.system()} {platform.release()}"
