"""A stored run or A/B is read, summarised, drawn and compared where torch and transformers cannot be imported."""

import subprocess
import sys
from pathlib import Path

READ_AND_DRAW = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "accelerate", "gguf", "safetensors"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocker())

from pathlib import Path
from bench.ab import record, verdicts
from bench.analysis.tidy import Tidy
from bench.judge import compare
from bench.tell.plots import comparison, style
from bench.tell.plots import run as run_plots
from bench.tell import notes
from bench.analysis import slopes, summary
from bench.analysis.cautions import cautions
from bench.tell import tables
from bench.tell.words import case_labels
from tests.handmade import grid, make_run
from tests.torture import store_ab

assert verdicts.stored_verdicts(record.read(store_ab(Path(sys.argv[1]) / "ab")))
run = make_run(grid(["naive", "dynamic"], [32, 128]))
tidy = Tidy.of(run)
summarized, steps = summary.summarize(tidy), tidy.steps
lines = slopes.slopes(steps)
assert tables.render(summarized, "md") and notes.slope_lines(lines) and notes.closing_lines(tidy, summarized)
assert notes.caution_lines(cautions(tidy, summarized), case_labels(summarized))
drawn = {name: figure for draw in run_plots.groups(summarized, steps, lines) for name, figure in draw().items()}
compared = compare.compare(run, run)
drawn |= comparison.comparison_figures(compared.rows, compared.a, compared.b)
for name, figure in drawn.items():
    style.save(figure, Path(sys.argv[1]) / name)
print(" ".join(sorted(drawn)))
"""


def test_a_run_and_an_ab_are_read_drawn_and_compared(tmp_path):
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-c", READ_AND_DRAW, str(tmp_path)]
    answer = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == "forest overlay speedup step_latency throughput\n"
    assert len(list(tmp_path.glob("*.*"))) == 10
