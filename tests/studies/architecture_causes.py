"""Why a cell of the matrix is not right: the mechanism, whose it is, and its place in transformers 5.23."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cause:
    """One mechanism, under the name that the table has and the page links."""

    key: str
    whose: str
    words: str
    place: str = ""
    """Where in transformers, in words; empty where it is not transformers'."""


NOT_BUILT = Cause(
    "not-built",
    "The study's",
    "No small model of this type was made: it needs another package (gemma3n: timm), its config class refuses its own "
    "defaults or the parts that AutoConfig makes, or no row of tests/studies/architecture_configs.py shrinks its "
    "vision "
    "or audio. The table has the message.",
)
STOPPED = Cause(
    "stopped",
    "The study's",
    "Its process ended, or was stopped, before all cells were tried: `--only TYPE` tries it again.",
)
NOT_COMPILED = Cause(
    "not-compiled",
    "kvbench's choice",
    "`compiled` takes the architectures of [fast-path.md](fast-path.md#what-it-takes), and prompts of equal length.",
)
PADDING = Cause(
    "padding",
    "Transformers', refused by kvbench",
    "A padded row gives other logits than the row alone: the padding runs through a recurrent state or a "
    "convolution, is "
    "counted by learned positions or by a scale of the queries, or is seen by a sparse selection "
    "(findings/padded_rows.sh). kvbench compares every row with its tokens alone before it takes a mask.",
    "position embeddings that number the columns of a batch (modeling_bart and its kin, modeling_roformer, "
    "modeling_git); scales of the queries that do (modeling_llama4 and modeling_inkling: not by `position_ids`); "
    "scans and convolutions that no mask leaves out before they begin (modeling_rwkv, modeling_xlstm, "
    "modeling_recurrent_gemma, modeling_mamba); the compressor of modeling_deepseek_v4",
)
OWN_CACHE = Cause(
    "own-cache",
    "Transformers'",
    "The forward takes no `past_key_values`, or answers without it: a step would see its own token alone "
    "(findings/given_cache_ignored.sh). naive, and hf-generate where the model brings a cache of its own, are "
    "measured. Where earlier positions depend on later ones "
    "too, other tokens would come in any case: `false` in place of refused, as `kvbench run` says it.",
    "the forward of the causal model: no cache at all in modeling_openai; `cache` in modeling_xlm, "
    "`past_buckets_states` in modeling_reformer, `mems` in modeling_xlnet, `state` in modeling_rwkv, "
    "`cache_params` in modeling_xlstm, MiniMaxCache in modeling_minimax",
)
STATIC_LAYER = Cause(
    "no-static-layer",
    "Transformers'",
    "StaticCache has no layer for this layer type.",
    "cache_utils, STATIC_LAYER_TYPE_MAPPING",
)
HYBRID_MASK = Cause(
    "full-mask-by-window",
    "Transformers'",
    "Layers with a convolution's state beside keys and values, some with a window: the mask of those without one gets "
    "the width of the first layer, which has one, since a static cache counts them as linear. Where the window is "
    "shorter than the cache, the forward fails (findings/static_hybrid_mask.sh). Where it does not, steps of inkling "
    "are `false`: it reads a length that the cache then changes in place (findings/static_length_changes.sh).",
    "cache_utils, Cache.is_linear, which leaves out LinearAttentionAndFullAttentionLayer and not its static twin; "
    "masking_utils, find_first_full_attention_index; modeling_inkling, InklingAttention, `q_offset`",
)
CAPACITY = Cause(
    "window-by-capacity",
    "Transformers'",
    "Local attention cuts its own mask by the number of keys, which in a static cache is its whole capacity "
    "(findings/gpt_neo_static_window.sh).",
    "modeling_gpt_neo, GPTNeoSelfAttention._attn",
)
SEVERAL = Cause(
    "several-after-a-cache",
    "Transformers'",
    "Where several tokens follow those in a cache, the scan (in recurrent_gemma the convolution) begins from an empty "
    "state: the mixer reads the cached one for single tokens only (findings/tokens_after_a_state.sh). One prompt and "
    "single steps are right; a context (`-d`) or a prompt in chunks is not. recurrent_gemma's states are in its "
    "modules, in no cache (findings/recurrent_gemma_module_states.sh): kvbench marks and counts them there.",
    "the mixer's forward, the branch for `seq_len == 1` (modeling_mamba, MambaMixer; the same in "
    "modeling_falcon_mamba, "
    "modeling_jamba and modeling_zamba; modeling_recurrent_gemma, RecurrentGemmaRecurrentBlock, "
    "`position_ids.shape[1] != 1`)",
)
TOP_K = Cause(
    "top-k-ties",
    "Transformers'",
    "The indexer's scores pass a ReLU, so several are exactly 0, and topk takes others of these equals when the matrix "
    "has more columns (findings/dsa_topk_ties.sh). A position's logits change with the tokens after it once more are "
    "visible than are selected; naive is its own reference, and a cached step is `false`.",
    "the indexer's forward (modeling_deepseek_v32, and the models that copy it)",
)
POSITIONS = Cause(
    "positions-from-0",
    "Transformers'",
    "generate() numbers positions from 0, while the model's own begin after the padding's id "
    "(findings/roberta_generate_positions.sh). naive, dynamic and static are right.",
    "generation/utils, GenerationMixin.prepare_inputs_for_generation, against create_position_ids_from_input_ids of "
    "modeling_roberta",
)
LONGROPE = Cause(
    "rope-switch",
    "Transformers'",
    "Longrope changes all rotary angles at a length, and the keys in the cache have the old ones; the model replaces "
    "the cache it was given there (findings/longrope_cached_keys.sh).",
    "modeling_rope_utils, longrope_frequency_update; modeling_phi3, prepare_inputs_for_generation",
)
PREFIX = Cause(
    "not-prefix-stable",
    "The model's",
    "The logits of a position depend on the tokens after it: naive re-feed is its own reference, and a cache, whose "
    "entries are made once, cannot give the same.",
    "modeling_prophetnet, ProphetNetNgramSelfAttention with its predicting stream, not looked into further; "
    "modeling_cpmant, CpmAntModel.forward, `context` of ones: every token sees every other "
    "(findings/cpmant_prompt_in_cache.sh)",
)
ROUNDING = Cause(
    "rounding",
    "Nobody's",
    "In float32 the same is right, and rounding moves naive re-feed itself by at least half as much (column "
    "`rounding_error`: bfloat16 against the same weights in float32, and these moved by up to a step of bfloat16). "
    "With "
    "these random weights (standard deviation 0.25) that is beyond the tolerance of 0.03: rounding adds up, or changes "
    "the choice of an expert.",
)
ROUNDED_PADDING = Cause(
    "padding-in-bfloat16",
    "kvbench's caution",
    "In float32 a padded row gives the logits of the row alone; in bfloat16 rounding moves these random weights' "
    "logits "
    "beyond the tolerance by which kvbench checks that before it takes a mask.",
)
MIXED = Cause(
    "float32-in-bfloat16",
    "Transformers'",
    "A plain forward raises, with no cache in it: some parameters stay in float32 in a model loaded in bfloat16 "
    "(findings/float32_parameters_in_bfloat16.sh), or a gate computed in float32 meets bfloat16 values in a product "
    "(findings/xlstm_bfloat16.sh). Use float32.",
    "modeling_xlnet, XLNetRelativeAttention (torch.FloatTensor); modeling_reformer, AxialPositionEmbeddings; "
    "modeling_xlstm, the gates' product",
)
ADDED = Cause(
    "added-token",
    "Transformers'",
    "generate() feeds one token more than it has, a mask, and takes what the model predicts there "
    "(findings/generate_added_token.sh); naive takes what the last token predicts.",
    "modeling_xlm and modeling_xlnet, prepare_inputs_for_generation",
)
OWN_TOKENS = Cause(
    "prompt-tokens",
    "Transformers'",
    "The model puts tokens of its own before the prompt at every forward and keeps them in the cache, so that its "
    "masks "
    "and positions do not fit what was fed (findings/cpmant_prompt_in_cache.sh).",
    "modeling_cpmant, CpmAntModel.forward, `prompt_length`",
)
FAILS = Cause(
    "fails",
    "Transformers'",
    "Its own code raises at a valid input: refused, with the error and its place in the table.",
    "configuration_blt (no `num_hidden_layers`, which DynamicCache reads); modeling_prophetnet (`use_cache` asserts "
    "single tokens, masks are made for the tokens fed and not for those in the cache)",
)
BATCH_STATE = Cause(
    "batch-mixed-by-state",
    "Transformers'",
    "A step of one token broadcasts against the state of the token shift, which mixes the sequences of a batch "
    "(findings/rwkv_batch_state.sh). A batch of one is right.",
    "modeling_rwkv, the time shift of attention and feed-forward",
)
UNEXPLAINED = Cause("unexplained", "Not found out", "Seen, said by the proof, and not looked into.")

CAUSES = (
    *(TOP_K, SEVERAL, POSITIONS, LONGROPE, PREFIX, OWN_CACHE, OWN_TOKENS, STATIC_LAYER),
    *(HYBRID_MASK, CAPACITY, PADDING, ADDED),
    *(BATCH_STATE, MIXED, FAILS, ROUNDING, ROUNDED_PADDING, NOT_COMPILED, NOT_BUILT, STOPPED, UNEXPLAINED),
)
