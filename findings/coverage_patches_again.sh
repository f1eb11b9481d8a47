#!/usr/bin/env bash
# coverage with `patch = ["fork"]`, stopped and started again: each Coverage.start() patches once more (control.py calls
# apply_patches outside the part that runs once), so after N stops and starts a forked child begins N + 1 measurements
# before its first own line. pytest-cov's mark `no_cover` stops and starts coverage for each test that has it: in a suite
# with some 400 such cases a fork took 24 s of CPU, where it takes 0.1 s.
#
# Versions: coverage 7.17.5 (as pytest-cov 7.1.0 uses it), Python 3.11. Output seen:
#   0 stops and starts: the child begins 1 measurement(s)
#   50 stops and starts: the child begins 51 measurement(s)
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder (2 MB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet coverage==7.17.5
cd "$folder"
cat > pyproject.toml <<'TOML'
[tool.coverage.run]
patch = ["fork"]
parallel = true
debug = ["patch", "pid"]
TOML
cat > forks.py <<'PYTHON'
import os
import sys

import coverage

measured = coverage.Coverage(config_file="pyproject.toml")
measured.start()
for _ in range(int(sys.argv[1])):
    measured.stop()
    measured.start()
child = os.fork()
if child == 0:
    os._exit(0)
os.waitpid(child, 0)
measured.stop()
print("child", child)
PYTHON
for count in 0 50; do
    env/bin/python forks.py "$count" > output 2>&1
    child=$(sed -n 's/^child //p' output)
    begun=$(grep -c "^$child\..*Patching fork" output || true)
    echo "$count stops and starts: the child begins $begun measurement(s)"
    [ "$begun" -eq $((count + 1)) ] || exit 1
done
