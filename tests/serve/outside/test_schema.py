"""What schemathesis makes of /openapi.json: right and wrong values of every field, and answers of the form it tells."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

# Not asked of it: a vocabulary and a context bound what is accepted, and the document knows neither; and what it would
# make with one request, to use it in the next, does not exist here.
EXCLUDED = (
    "positive_data_acceptance",
    "use_after_free",
    "ensure_resource_availability",
    "object_level_authorization",
)


@pytest.mark.parametrize(
    "options",
    [
        # Each field's bounds, types and absence, one after the other: no chance in it. /v1/completions has the same.
        pytest.param(["--phases=coverage", "--exclude-path=/v1/completions"], id="short"),
        pytest.param(["--phases=coverage,fuzzing", "--max-examples=500"], id="long", marks=pytest.mark.slow),
    ],
)
def test_no_request_that_the_document_leads_to_fails(server, tmp_path, options):
    command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json", *options]
    command += ["--checks=all", f"--exclude-checks={','.join(EXCLUDED)}", "--request-timeout=60"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
