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
JSON_PATHS = MODEL_PATHS - {"/v1/embeddings", "/v1/pooling"}
CHOICE_PATHS = frozenset(("/v1/chat/completions", "/v1/completions"))  # whose answers have `choices`
