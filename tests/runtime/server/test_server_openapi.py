"""schemathesis against the server's own description: requests of every shape, right and wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.running import running

# Not positive_data_acceptance: a string that is no picture fits the description, and is refused.
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "negative_data_rejection", "unsupported_method", "ignored_auth", "missing_required_header",
)  # fmt: skip


@pytest.mark.parametrize("words", [(), ("--api-key", "key", "--accept-token-ids", "--unknown-task", "ignore")])
def test_no_request_is_too_strange(small_bundle: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    with running(small_bundle, *words) as server:
        key = ["--header", "Authorization: Bearer key"] if words else []
        done = subprocess.run(
            [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json", *key,
             "--checks", ",".join(CHECKS), "--max-examples", "40", "--seed", "1", "--no-color"],
            cwd=tmp_path, env=os.environ | {"COLUMNS": "200"}, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
        assert "7 selected" in done.stdout and "Traceback" not in server.log
