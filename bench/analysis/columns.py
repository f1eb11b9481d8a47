"""The columns of `summary.csv` in their order: name, type, unit, meaning. The table of results/README.md is made of it.

After a change run `python -m bench.analysis.columns results/README.md`, which writes the table between its two marks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

TEXT, COUNT, FIGURE = "string", "Int64", "float64"

BEGIN, END = "<!-- columns: made by bench/analysis/columns.py -->", "<!-- end of columns -->"
"""What stands before and after the table in results/README.md."""


class Column(NamedTuple):
    """One column of the summary. What a row leaves out is empty."""

    name: str
    dtype: str
    """Of pandas; each of the three used has an empty value."""
    unit: str
    meaning: str


def _interval(name: str, of: str, unit: str = "ratio") -> list[Column]:
    return [
        Column(f"{name}_low", FIGURE, unit, f"lower end of the 95 % interval of {of}"),
        Column(f"{name}_high", FIGURE, unit, "upper end of it"),
    ]


COLUMNS: list[Column] = [
    Column("model", TEXT, "-", "model spec, as given to `--model`"),
    Column("strategy", TEXT, "-", "`naive`, `dynamic`, `static`, ..., or `cache:module:factory`, the user's own"),
    Column("phase", TEXT, "-", "`prefill` (one prompt in, one token out) or `decode` (one token in, one token out)"),
    Column("device", TEXT, "-", "`cpu` or `cuda`"),
    Column("dtype", TEXT, "-", "of weights and cache"),
    Column("attn_implementation", TEXT, "-", "transformers' attention: `sdpa`, `eager`, ..."),
    Column("n_threads", COUNT, "threads", "CPU threads of torch"),
    Column("batch_size", COUNT, "sequences", "fed at once"),
    Column("n_prompt", COUNT, "tokens", "fed by the prefill, per sequence"),
    Column(
        "n_gen", COUNT, "tokens", "emitted, per sequence; the first is the prefill's, so decode has n_gen - 1 steps"
    ),
    Column(
        "n_depth",
        COUNT,
        "tokens",
        "in the cache before the prompt, untimed; naive feeds them again like everything else",
    ),
    Column("samples", COUNT, "turns", "timed turns behind the figures, without warm-ups and disturbed rounds"),
    Column(
        "latency_ms",
        FIGURE,
        "ms",
        "median; prefill: TTFT (forward and first argmax); decode: TPOT (decode total / (n_gen - 1))",
    ),
    *_interval("latency_ms", "the median, exact (order statistics); empty below six samples", "ms"),
    Column(
        "tokens_per_s",
        FIGURE,
        "tokens/s",
        "whole batch; prefill: prompt tokens / TTFT; decode: new tokens / TPOT (the prompt is never counted)",
    ),
    Column(
        "speedup_vs_naive",
        FIGURE,
        "ratio",
        "naive's latency / this latency, paired by round (Hodges-Lehmann of the log ratios); 1 for naive itself",
    ),
    *_interval("speedup", "the speed-up (signed rank); empty below six pairs"),
    Column(
        "flops",
        COUNT,
        "FLOP",
        "of the phase's matrix products, by arithmetic: `gemm_flops + gemv_flops`; one multiply-add is two",
    ),
    Column(
        "bytes",
        COUNT,
        "bytes",
        "that the phase must move at least: weights once per forward, keys and values read and written as "
        "the kind of cache stores them, logits; like all that follows from it, empty for the user's own cache",
    ),
    Column("arithmetic_intensity", FIGURE, "FLOP/byte", "`flops / bytes`"),
    Column(
        "gemm_flops",
        COUNT,
        "FLOP",
        "in products of more than one row (batch x positions; query positions for attention)",
    ),
    Column("gemv_flops", COUNT, "FLOP", "in products of one row"),
    Column(
        "mfu",
        FIGURE,
        "ratio",
        "FLOPs per second as a share of the GEMM rate, by the fastest of several kernels, in its turns that lie "
        "nearest before and after in the same round; paired like the speed-up",
    ),
    Column(
        "mbu",
        FIGURE,
        "ratio",
        "bytes per second as a share of the read bandwidth, measured likewise; empty where the weights take no more "
        "than twice the last-level cache",
    ),
    Column(
        "bound",
        TEXT,
        "-",
        "the limiting resource: `compute` or `memory`, whichever needs more time at its roof; `overhead` where even "
        "that is under half the measured time",
    ),
    Column(
        "predicted_ms",
        FIGURE,
        "ms",
        "`latency_ms` as costs and ceilings predict it, with the shares of the roofs and the overhead per forward that "
        "the other cases of the strategy and phase show (same model and settings; never the case itself); empty where "
        "there are none",
    ),
    Column("forward_calls", COUNT, "calls", "of the model, in the phase"),
    Column(
        "tokens_processed",
        COUNT,
        "tokens",
        "fed in the phase, whole batch; naive decode: batch x the sum of the prefix lengths",
    ),
    Column(
        "kv_bytes_predicted", COUNT, "bytes", "keys and values held at the end of the phase, by arithmetic; as `bytes`"
    ),
    Column(
        "kv_bytes_measured",
        COUNT,
        "bytes",
        "the same, read from the cache's tensors; a static cache's padding is not counted",
    ),
    Column(
        "peak_memory_bytes",
        COUNT,
        "bytes",
        "CPU: resident memory of the strategy's process at its peak, mapped weights included; CUDA: allocator's peak",
    ),
    Column("compile_s", FIGURE, "s", "spent compiling, never part of a latency; empty where nothing is compiled"),
    Column(
        "steps_timed",
        COUNT,
        "steps",
        "decode steps timed in a turn; fewer than n_gen - 1 where a long naive decode is timed at every k-th position "
        "and interpolated (`nox -s study -- interpolation` compares that with full decodes)",
    ),
    Column(
        "tokens_match",
        TEXT,
        "-",
        "`true`: same tokens as naive re-feed; `tie`: other tokens, logits within the tolerance of the dtype; "
        "`false`: failed, but for a lossy strategy, of which this only says that a token of its own run differs",
    ),
    Column(
        "status",
        TEXT,
        "-",
        "`ok`, `failed`, `oom`, `timeout`, `unsupported`, or `not measured` (the run ended before the case)",
    ),
    Column("error", TEXT, "-", "why it is not `ok`"),
    *_interval("mfu", "`mfu` (signed rank); empty below six pairs"),
    *_interval("mbu", "`mbu` (signed rank); empty below six pairs"),
    Column(
        "speedup_vs_hf", FIGURE, "ratio", "as `speedup_vs_naive`, over `hf-generate` (transformers' own `generate`)"
    ),
    *_interval("speedup_vs_hf", "`speedup_vs_hf`"),
    Column(
        "framework_ms",
        FIGURE,
        "ms",
        "of a decode step before any arithmetic (Python, transformers, torch's dispatch): the median step of the same "
        "modules with heads, MLPs and vocabulary too narrow to matter, at a prompt of 8, timed once per process, "
        "strategy and batch size before the rounds, and repeated in every row that shares them; empty for prefill, "
        "naive, what is compiled, models that cannot be shrunk so, on CUDA, where Python runs ahead of the kernels, "
        "and where it exceeds the step itself, since the machine was slower when it was timed",
    ),
    Column("exact", TEXT, "-", "`true`: held to naive's logits; `false`: lossy, judged by its quality"),
    Column(
        "kv_bytes_allocated",
        COUNT,
        "bytes",
        "every storage reachable from the cache at the end of the phase, each once: scales, codebooks, residual "
        "windows, padding, copies kept beside; nothing of the model",
    ),
    Column(
        "kv_bytes_allocated_predicted",
        COUNT,
        "bytes",
        "the same, by arithmetic; empty for the user's own",
    ),
    Column(
        "kv_bytes_per_token",
        FIGURE,
        "bytes",
        "slope of `kv_bytes_allocated` against the tokens held, per sequence, over the run's cases that differ in "
        "n_prompt or n_depth alone; empty where all are of one length",
    ),
    Column(
        "matching_tokens",
        COUNT,
        "tokens",
        "lossy strategies: the first tokens of its own greedy run that equal naive's; the fewest over the batch",
    ),
    Column(
        "top1_agreement",
        FIGURE,
        "ratio",
        "lossy strategies: share of positions with the exact run's most likely token, over a text that the model "
        "itself wrote (run's seed, temperature 1), whose last 128 positions (or as many as fit) go through decode",
    ),
    Column(
        "recall_agreement",
        FIGURE,
        "ratio",
        "the same over a passage from the text's beginning, repeated as its last 64 tokens: what was evicted is missed",
    ),
    Column(
        "logit_kl",
        FIGURE,
        "nats",
        "Kullback-Leibler divergence of the exact predictions from these, mean",
    ),
    Column(
        "logit_kl_floor",
        FIGURE,
        "nats",
        "what bfloat16 alone does over the same text, against float32; empty where the model could not be copied",
    ),
    Column("perplexity_ratio", FIGURE, "ratio", "perplexity of the text under the strategy / under the exact run"),
    Column(
        "kv_bytes_vs_exact",
        FIGURE,
        "ratio",
        "`kv_bytes_allocated` / that of `dynamic` in the same cell (kinds that compile: of `compiled`)",
    ),
    Column(
        "latency_vs_exact",
        FIGURE,
        "ratio",
        "`latency_ms` / that of `dynamic` in the same cell (kinds that compile: of `compiled`), paired like the "
        "speed-up; 1 for these themselves",
    ),
    *_interval("latency_vs_exact", "`latency_vs_exact`"),
    Column("machine", TEXT, "-", "host name of the machine that measured the run"),
]

NAMES: list[str] = [column.name for column in COLUMNS]
TYPES: dict[str, str] = {column.name: column.dtype for column in COLUMNS}


def table() -> str:
    """Make the Markdown table of all columns."""
    lines = [f"| `{column.name}` | {column.unit} | {column.meaning} |\n" for column in COLUMNS]
    return "".join(["| column | unit | meaning |\n", "|---|---|---|\n", *lines])


def with_table(document: str) -> str:
    """Replace what stands between the two marks of `document` by the table.

    Raises:
        ValueError: a mark is missing.
    """
    before, after = document.index(BEGIN) + len(BEGIN), document.index(END)
    return f"{document[:before]}\n{table()}{document[after:]}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")
