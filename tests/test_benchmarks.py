"""The benchmark runs, and says what it measured."""

import json
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parents[1] / "benchmarks" / "run.py"


def test_it_measures_a_build_beside_its_floor(tmp_path):
    given = [
        "--size",
        "none",
        "--rounds",
        "1",
        "--scratch",
        tmp_path,
        "--only",
        "stack",
        "SLERP of 2",
    ]
    done = subprocess.run([sys.executable, RUN, *given], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[1:]] == ["| stack", "| SLERP of 2"]
    results = json.loads((tmp_path / "results.json").read_text())
    for found in results.values():
        assert {"moeforge", "floor", "durable", "start"} <= found.keys()
        assert all(run["seconds"] > 0 for runs in found.values() for run in runs)
        assert found["memory"][0]["peak"] > 10_000_000
        assert found["moeforge"][0]["peak"] == 0, "what is timed is not looked at"
