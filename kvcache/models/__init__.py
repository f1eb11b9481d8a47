"""A spec -> a model: described from its configuration, loaded, its weights named."""

from kvcache.models.random_weights import GEOMETRIES as GEOMETRIES
from kvcache.models.skeleton import ATTN_IMPLEMENTATIONS as ATTN_IMPLEMENTATIONS
from kvcache.models.sources import BUNDLED as BUNDLED
from kvcache.models.spec import DTYPES as DTYPES
from kvcache.models.spec import ModelDescription as ModelDescription
from kvcache.models.spec import describe as describe
from kvcache.models.spec import load as load
from kvcache.models.spec import load_tokenizer as load_tokenizer
from kvcache.models.spec import weights_digest as weights_digest
from kvcache.models.spec import without_weights as without_weights
from kvcache.models.weight_cache import ModelError as ModelError
