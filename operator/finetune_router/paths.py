"""The paths of the data port."""

MODELS_PATH = "/v1/models"
FEEDBACK_PATH = "/v1/feedback"
HEALTH_PATH = "/health"
# POSTs whose JSON body carries `model`. A list, because engines also have paths that manage adapters.
MODEL_PATHS = frozenset(
    (
        "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages", "/v1/rerank",
        "/v1/score", "/v1/classify", "/v1/pooling", "/v1/moderations",
    )
)  # fmt: skip
# The others also answer in bytes, where the request's `encoding_format` asks for that.
_JSON_PATHS = MODEL_PATHS - {"/v1/embeddings", "/v1/pooling"}
_CHOICE_PATHS = frozenset(("/v1/chat/completions", "/v1/completions"))


def always_in_json(target: str) -> bool:
    """Whether answers there are JSON. `target` is a path with or without a query."""
    return target.partition("?")[0] in _JSON_PATHS


def has_choices(target: str) -> bool:
    """Whether answers there have `choices`. `target` is a path with or without a query."""
    return target.partition("?")[0] in _CHOICE_PATHS
