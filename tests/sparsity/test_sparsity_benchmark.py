"""The benchmark of sparse training runs from start to end, and compares like with like."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "sparse_training.py"


def test_every_method_gets_the_same_number_of_connections(tmp_path):
    if not SCRIPT.exists():
        pytest.skip("benchmarks/ is not part of an installed package")
    options = "--data digits --hidden 12,12 --steps 40 --seeds 2 --delta-t 10 --rewind-to 5"
    subprocess.run(
        [sys.executable, SCRIPT, *options.split(), "--sparsities", "0.8,0.9", "--out", tmp_path],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
    )
    (path,) = tmp_path.glob("*.json")
    result = json.loads(path.read_text())
    assert {"date", "device", "versions", "settings"} <= set(result)
    total = 64 * 12 + 12 * 12 + 12 * 10
    rows = {(row["method"], row["sparsity"]): row for row in result["results"]}
    methods = set(result["settings"]["methods"].split(","))
    assert set(rows) == {(m, s) for m in methods - {"dense"} for s in (0.8, 0.9)} | {("dense", 0.0)}
    for (method, sparsity), row in rows.items():
        assert len(row["accuracy"]) == 2
        assert all(0 <= a <= 1 for a in row["accuracy"])
        connections = [sum(layers) for layers in row["connections"]]
        wanted = total - round(sparsity * total)
        if method == "small-dense":
            assert wanted / 2 < connections[0] <= wanted + 12 * 2
        elif method == "lottery":  # rounds of pruning, each rounded to a whole connection
            assert all(abs(count - wanted) <= 3 for count in connections)
        else:
            assert connections == [wanted, wanted]
    cost = {method: rows[method, 0.9]["flops_over_dense"] for method in methods - {"dense"}}
    assert cost["static"] == cost["set"] == pytest.approx(0.1, abs=1e-3)
    assert cost["static"] < cost["rigl"] < cost["gradual"] < 1 < cost["lottery"]
