#!/usr/bin/env bash
# submitit's LocalExecutor, made for trying a job here before it goes to Slurm, hides every GPU from the job: unless
# gpus_per_node is given, it sets CUDA_VISIBLE_DEVICES to nothing, whatever the caller's environment says. A model then
# runs on the CPU, or fails for want of a device, without a word from submitit.
#
# Version: submitit 1.5.4. Output seen:
#   CUDA_VISIBLE_DEVICES here: '3', in a local job: '', with gpus_per_node=1: '0'
# Exits 1 if that changes. Needs network access to PyPI; installs into a temporary folder.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet submitit==1.5.4
cd "$folder"
CUDA_VISIBLE_DEVICES=3 "$folder/env/bin/python" - <<'PYTHON'
import os

import submitit

seen = []
for parameters in ({}, {"gpus_per_node": 1}):
    executor = submitit.LocalExecutor("jobs")
    executor.update_parameters(timeout_min=1, **parameters)
    seen.append(executor.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result())
here = os.environ["CUDA_VISIBLE_DEVICES"]
print(f"CUDA_VISIBLE_DEVICES here: {here!r}, in a local job: {seen[0]!r}, with gpus_per_node=1: {seen[1]!r}")
assert (here, *seen) == ("3", "", "0"), "the behaviour has changed"
PYTHON
