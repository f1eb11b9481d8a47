#!/usr/bin/env bash
# torch's inductor under AVX2, with GCC 12: every vector of 32-bit integers that a compiled loop loads goes through the
# stack. Vectorized<int32_t>::loadu(ptr, count) in ATen/cpu/vec/vec256/vec256_int.h has no case for a whole vector, as
# that of float and those for AVX-512 have; it copies to an array first, and GCC copies 32 bytes as two moves of 16. The
# load of 32 bytes that follows waits until both stores are done, at every step of the loop. Told to move 32 bytes at
# once (-mmove-max=256 -mstore-max=256, which TORCHINDUCTOR_CPP_MARCH takes behind the architecture), GCC leaves the
# copy out. The loop reads four 8-bit integers from each 32-bit word, as a quantised KV cache does.
#
# Versions: torch 2.13.0, GCC 12.2 (binutils 2.40), any x86-64 processor with AVX2. Output seen (two cores of a Zen 3):
#   x86-64-v3: integer vectors go through the stack in halves
#   x86-64-v3 -mmove-max=256 -mstore-max=256: integer vectors are loaded whole
#   the second takes less than 0.8 of the first's time
# Exits 1 if that changes. Needs g++, objdump and network access to PyPI; installs into a temporary folder (0.3 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet torch==2.13.0 numpy==2.4.3
cat > "$folder/words.py" <<'PYTHON'
import os
import re
import subprocess
import time
from pathlib import Path

import torch
from torch._inductor import config

config.cpp.simdlen = 256  # AVX2, on processors with AVX-512 too
torch.set_num_threads(1)


@torch.compile
def weighted(words, factors):
    return sum((words << shift).float() * factor for shift, factor in zip((24, 16, 8, 0), factors)).sum(1)


torch.manual_seed(0)
words, factors = torch.randint(-(2**31), 2**31, (512, 16, 16), dtype=torch.int32), torch.randn(4, 16, 1)
expected = sum((words << shift).double() * factor for shift, factor in zip((24, 16, 8, 0), factors.double())).sum(1)
assert (weighted(words, factors) - expected).abs().max() < 1e-5 * expected.abs().max()
seconds = []
for _ in range(500):
    start = time.perf_counter()
    weighted(words, factors)
    seconds.append(time.perf_counter() - start)
code = ""
for library in Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).rglob("*.so"):
    code += subprocess.run(["objdump", "-d", library], check=True, capture_output=True, text=True).stdout
halves = re.findall(r"vmovdqu .*,(%xmm\d+)\n(?:.*\n){0,6}?.*vmovdqa \1,", code)
print(f"{len(halves)} {min(seconds)}")
PYTHON
measure() {
    TORCHINDUCTOR_CACHE_DIR=$folder/$1 TORCHINDUCTOR_CPP_MARCH=$2 "$folder/env/bin/python" "$folder/words.py"
}
read -r halves slow < <(measure plain "x86-64-v3")
read -r none fast < <(measure whole "x86-64-v3 -mmove-max=256 -mstore-max=256")
echo "halves: $halves and $none; seconds: $slow and $fast" >&2
[ "$halves" -gt 0 ] || { echo "the behaviour has changed: no vector goes through the stack"; exit 1; }
echo "x86-64-v3: integer vectors go through the stack in halves"
[ "$none" -eq 0 ] || { echo "the behaviour has changed: some vectors still go through the stack"; exit 1; }
echo "x86-64-v3 -mmove-max=256 -mstore-max=256: integer vectors are loaded whole"
"$folder/env/bin/python" -c "assert $fast < 0.8 * $slow, 'the behaviour has changed: $slow s and $fast s'"
echo "the second takes less than 0.8 of the first's time"
