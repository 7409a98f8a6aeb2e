"""Owns the process that loads and runs a checkpoint, so that whoever asks stays small and alive."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import moeforge
from moeforge.errors import Finding
from moeforge.proof.verify.checks import Check, judged, skipped

_START = (  # not from the working directory, which -c puts in front
    "import sys; sys.path[:] = [sys.argv[1], *filter(None, sys.path)]; "
    "from moeforge.proof.verify.child import main; main(sys.argv[2])"
)


def start(folder: Path, **options: Any) -> subprocess.Popen[str]:
    """Start `running.run_checks` with these arguments in a process of its own."""
    root = str(Path(moeforge.__file__).parent.parent)
    asked = json.dumps({"folder": str(folder.absolute()), **options})
    return subprocess.Popen(
        [sys.executable, "-c", _START, root, asked],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",  # of what libraries say
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
    )


def finish(process: subprocess.Popen[str]) -> list[Check]:
    """Wait for such a process, and return its checks."""
    try:
        answer, said = process.communicate()
    except BaseException:
        process.kill()
        process.wait()
        raise
    if process.returncode == 0:
        return [_check(data) for data in json.loads(answer)]
    if process.returncode < 0:
        why = f"was ended by {signal.Signals(-process.returncode).name}"
        fix = "Memory may be short; --no-verify leaves this out of a build."
    else:
        why, fix = f"failed: {(said.strip().splitlines() or ['it said nothing'])[-1]}", ""
    failed = judged("load", [Finding(f"the process that loads the model {why}", fix)])
    return [failed, *skipped("the process that loads the model ended", "tokenizer", "forward")]


def _check(data: Mapping[str, Any]) -> Check:
    findings = tuple(Finding(**{**f, "path": tuple(f["path"])}) for f in data["findings"])
    return Check(data["name"], data["state"], data["detail"], findings)


def main(asked: str) -> None:
    """Answer on standard output, and let nothing else write there."""
    answer = os.dup(1)
    os.dup2(2, 1)
    from moeforge.proof.verify.running import run_checks

    options = json.loads(asked)
    checks = run_checks(Path(options.pop("folder")), **options)
    with os.fdopen(answer, "w", encoding="utf-8") as out:
        json.dump([asdict(check) for check in checks], out)
