"""What the tests of the benchmark share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jinaclip_bench.measuring import timing


@pytest.fixture(scope="module", autouse=True)
def no_pauses() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timing, "SETTLE_S", 0.0)
        yield


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages of jinaclip's logger. torch writes to others."""
    return [record.getMessage() for record in caplog.records if record.name == "jinaclip"]
