"""Why a cell of the matrix is not right: whose it is, the mechanism, and its place in transformers 5.23."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Cause:
    """One mechanism, under the name that the page links."""

    key: str
    whose: str
    words: str


NOT_BUILT = Cause(
    "not-built",
    "The study's",
    "No small model of this type came about: it needs another package, or vision and audio that no row of "
    "tests/studies/architecture_configs.py shrinks. The table has what was said.",
)
ENCODER = Cause("encoder", "kvbench's choice", "An encoder and a decoder: kvbench takes decoders.")
PADDING = Cause(
    "padding",
    "Transformers', refused by kvbench",
    "A padded row gives other logits than the row alone: the padding runs through a recurrent state "
    "or a convolution, is "
    "counted by learned positions, or is seen by a sparse selection. kvbench compares the row that "
    "has the most padding "
    "before it takes a mask.",
)
OWN_CACHE = Cause(
    "own-cache",
    "Transformers'",
    "The forward takes no `past_key_values`, or answers without it: a step would see its own token alone. naive, and "
    "hf-generate where the model brings a cache of its own, are measured.",
)
STATIC_LAYER = Cause(
    "no-static-layer",
    "Transformers'",
    "StaticCache has no layer for this layer type (cache_utils, the table of static layers).",
)
CAPACITY = Cause(
    "window-by-capacity",
    "Transformers'",
    "Local attention cuts its own mask by the number of keys (the model's attention module), which "
    "in a static cache is "
    "its whole capacity.",
)
SEVERAL = Cause(
    "several-after-a-cache",
    "Transformers'",
    "Where several tokens follow those in a cache, the scan begins from an empty state: the mixer "
    "reads the cached state "
    "for single tokens only. One prompt and single steps are right; a context (`-d`) or a prompt in chunks is not.",
)
TOP_K = Cause(
    "top-k-ties",
    "Transformers'",
    "The indexer's scores pass a ReLU, so several are exactly 0, and topk takes others of these "
    "equals when the matrix has "
    "more columns (findings/dsa_topk_ties.sh). A position's logits change with the tokens after it "
    "once more are visible "
    "than are selected; naive is its own reference, and a cached step is `false`.",
)
POSITIONS = Cause(
    "positions-from-0",
    "Transformers'",
    "generate() numbers positions from 0, while the model's own begin after the padding's id "
    "(findings/roberta_generate_positions.sh). naive, dynamic and static are right.",
)
LONGROPE = Cause(
    "rope-switch",
    "Transformers'",
    "Longrope changes all rotary angles at a length, and the keys in the cache have the old ones; "
    "the model replaces the "
    "cache it was given there (modeling_phi3, prepare_inputs_for_generation).",
)
REPEATS = Cause("not-repeatable", "The model's", "It gives other logits for the same tokens: nothing can be proved.")
PREFIX = Cause(
    "not-prefix-stable",
    "The model's",
    "The logits of a position depend on the tokens after it (attention both ways, or pooling over "
    "blocks): naive re-feed "
    "is its own reference, and a cache, whose entries are made once, cannot give the same.",
)
ROUNDING = Cause(
    "rounding",
    "Nobody's",
    "In float32 the same is right, and rounding moves naive re-feed itself by at least half as much (column "
    "`rounding_error`: bfloat16 against the same weights in float32, and these moved by up to a step of bfloat16). "
    "With these random weights (standard deviation 0.25) that is beyond the tolerance of 0.03: rounding adds up, or "
    "changes the choice of an expert.",
)
ROUNDED_PADDING = Cause(
    "padding-in-bfloat16",
    "kvbench's caution",
    "In float32 a padded row gives the logits of the row alone; in bfloat16 rounding moves these random weights' "
    "logits beyond the tolerance by which kvbench checks that before it takes a mask.",
)
MIXED = Cause(
    "float32-in-bfloat16",
    "Transformers'",
    "A plain forward raises, with no cache in it: some parameters stay in float32 in a model loaded in bfloat16 "
    "(xlnet's attention, reformer's axial positions: findings/float32_parameters_in_bfloat16.sh), or a gate computed "
    "in float32 meets bfloat16 values in a product (findings/xlstm_bfloat16.sh). Use float32.",
)
ADDED = Cause(
    "added-token",
    "Transformers'",
    "generate() feeds one token more than it has, a mask, and takes what the model predicts there "
    "(prepare_inputs_for_generation); naive takes what the last token predicts.",
)
OWN_TOKENS = Cause(
    "prompt-tokens",
    "Transformers'",
    "The model puts tokens of its own before the prompt and keeps them in the cache, so that its "
    "masks and positions do "
    "not fit what was fed.",
)
FAILS = Cause(
    "fails",
    "Transformers'",
    "Its own code raises at a valid input; the table has the error, and `kvbench run` stores it.",
)
BATCH_STATE = Cause(
    "batch-mixed-by-state",
    "Transformers'",
    "A step of one token broadcasts against the state of the token shift, which mixes the sequences of a batch "
    "(findings/rwkv_batch_state.sh). A batch of one is right.",
)
UNEXPLAINED = Cause("unexplained", "Not found out", "Seen, said by the proof, and not looked into.")

CAUSES = (
    *(TOP_K, SEVERAL, POSITIONS, LONGROPE, PREFIX, REPEATS, OWN_CACHE, OWN_TOKENS, STATIC_LAYER, CAPACITY, PADDING),
    *(ADDED, BATCH_STATE, MIXED, FAILS, ROUNDING, ROUNDED_PADDING, ENCODER, NOT_BUILT, UNEXPLAINED),
)

_BY_WORDS = {
    "an encoder and a decoder": ENCODER,
    "for a prompt that is padded": PADDING,
    "takes no past_key_values": OWN_CACHE,
    "leaves the cache empty": OWN_CACHE,
    "in no Cache of transformers": OWN_CACHE,
    "a cache of its own": OWN_CACHE,
    "StaticCache has no layer": STATIC_LAYER,
    "in a static cache": CAPACITY,
    "from the longest row": LONGROPE,
    "has no num_hidden_layers": FAILS,
    "fed the same tokens again": REPEATS,
    "expected scalar type Float but found BFloat16": MIXED,
    "expect parameter to have scalar type of Float": MIXED,
    "to have the same dtype, but got: float != c10::BFloat16": MIXED,
}
_BY_TYPE = {
    TOP_K: {"axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4"},
    SEVERAL: {"falcon_mamba", "jamba", "mamba", "mamba2", "recurrent_gemma", "zamba"},
    POSITIONS: {
        "camembert",
        "data2vec-text",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    },
    LONGROPE: {"phi3", "phimoe", "phi4_multimodal"},
    OWN_TOKENS: {"cpmant"},
    BATCH_STATE: {"rwkv"},
    ADDED: {"xlm", "xlnet"},
    PREFIX: {"prophetnet"},
}


def cause_of(cell: Mapping[Any, Any], right_in_float32: bool = False) -> Cause:
    """Return why a cell (a row of the study's table) that is not right is so."""
    reason = str(cell["reason"])
    for words, cause in _BY_WORDS.items():
        if words in reason:
            narrow = cause == PADDING and right_in_float32 and cell["dtype"] == "bfloat16"
            return ROUNDED_PADDING if narrow else cause
    if not cell["scenario"]:
        return NOT_BUILT
    if right_in_float32 and cell["dtype"] == "bfloat16" and cell["outcome"] == "false":
        # Both paths lie about so far from the exact one.
        return ROUNDING if float(cell["logits_error"]) <= 2 * float(cell["rounding_error"] or 0) else UNEXPLAINED
    if cell["outcome"] == "failed" and cell["model_type"] not in _BY_TYPE[OWN_TOKENS]:
        return FAILS
    for cause, types in _BY_TYPE.items():
        if cell["model_type"] in types:
            return cause
    return PREFIX if str(cell["prefix_stable"]) == "False" else UNEXPLAINED
