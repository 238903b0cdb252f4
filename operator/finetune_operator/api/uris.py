"""URIs of models, data and artifacts: which schemes each may have, and how a wrong one is explained."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from finetune_operator.api.rules import quote, rule, rules

# scheme -> (form that the URI must have (RE2), how it is explained)
SHAPES = {
    "s3": ("s3://[A-Za-z0-9][A-Za-z0-9._-]*/.+", "s3://bucket/path"),
    "gs": ("gs://[A-Za-z0-9][A-Za-z0-9._-]*/.+", "gs://bucket/path"),
    "pvc": (
        "pvc://[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[^/].*",
        "pvc://claim/path, where claim is a PersistentVolumeClaim in the same namespace",
    ),
    "file": ("file:///[^/].*", "file:///absolute/path with three slashes"),
}
HF_MODEL = (
    "hf://[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*",
    "hf://organization/model and nothing behind it; a branch, tag or commit goes into revision",
)
HF_DATA = (
    "hf://datasets/[^/]+/[^/]+/.+",
    "hf://datasets/organization/name/path/to/file.jsonl",
)
HTTP = ("https?://[^/]+/.+", "https://host/path/to/file.jsonl")

# Query parameters of pre-signed URLs: whoever can read the job could read the data.
SIGNED_QUERY = (
    "(?i)[?&](x-(amz|goog)-[a-z-]+|sig|signature|(access_)?token|api_?key|awsaccesskeyid|password|secret)="
)

BY_REFERENCE = "put the credentials into a Secret and name it in secretRef"
BY_AGENT = "give the credentials to the agent beside the engine, in its environment"


def _safe(credentials: str) -> tuple[dict[str, str], ...]:
    return (
        rule("!self.matches('^[a-z0-9]+://[^/]*@')", f"a URI must not carry credentials; {credentials}"),
        rule(
            f"!self.matches({quote(SIGNED_QUERY)})",
            "a pre-signed URL or an access token in a URI is a credential that everybody who reads the object can "
            f"use; use the plain URI, and {credentials}",
        ),
        rule(
            "!self.matches('(^|/)[.][.]?(/|$)')",
            "must not have '.' or '..' as a part of its path; write the path as it is",
        ),
        rule(
            "!self.matches('^ | $|[[:cntrl:]]')",
            "must not begin or end with a blank and must not hold tabs or line breaks",
        ),
    )


def uri_rules(
    shapes: dict[str, tuple[str, str]], *, what: str, credentials: str = BY_REFERENCE
) -> tuple[dict[str, str], ...]:
    """Rules for a URI with one of the schemes in `shapes`; `what` names the thing in messages, `credentials` says where
    they belong."""
    schemes = "^(" + "|".join(shapes) + ")://"
    forms = "^(" + "|".join(shape for shape, _ in shapes.values()) + ")$"
    choices = ", ".join(f"{scheme}://" for scheme in shapes)
    unknown = f"{what} needs a URI with one of the schemes {choices}"
    remedy = (
        f"self.startsWith('/') ? 'an absolute path needs its scheme: write file://' + self : {quote(unknown)}"
    )
    if shapes.get("hf") is HF_MODEL:
        hub = "self.matches('^[A-Za-z0-9_-]+/[A-Za-z0-9._-]+$')"
        remedy = (
            f"{hub} ? 'has no scheme: a model of the Hugging Face Hub is written hf://' + self : {remedy}"
        )
    form = quote("must be " + next(iter(shapes.values()))[1])
    for scheme, (_, explanation) in shapes.items():
        form = f"self.startsWith({quote(scheme + '://')}) ? {quote('must be ' + explanation)} : {form}"
    return (
        rule(f"self.matches({quote(schemes)})", unknown, messageExpression=remedy),
        rule(
            f"!self.matches({quote(schemes)}) || self.matches({quote(forms)})",
            "must be one of: " + "; ".join(dict.fromkeys(explanation for _, explanation in shapes.values())),
            messageExpression=form,
        ),
        *_safe(credentials),
    )


# A data file is recognized by its name, so a name that says nothing is refused before anything is started.
DATA_FILE = rule(
    "self.matches('(?i)[.]((jsonl|ndjson|json|csv)([.]gz)?|parquet)([?].*)?$')",
    "must name one data file that ends in .jsonl, .json, .csv (each also with .gz) or .parquet",
    messageExpression="(self.endsWith('/') ? 'is a folder; name each file as a source of its own: ' : '') + "
    "'must name one data file that ends in .jsonl, .json, .csv (each also with .gz) or .parquet'",
)
ONE_FILE = rule(
    "!self.contains('*')",
    "must name one file; patterns with * are not expanded, so add a source for each file",
)

ModelUri = Annotated[
    str,
    Field(
        min_length=1,
        max_length=1024,
        json_schema_extra=rules(*uri_rules({"hf": HF_MODEL, **SHAPES}, what="a model")),
    ),
]
DATA_SHAPES = {"hf": HF_DATA, **SHAPES, "https": HTTP, "http": HTTP}
DataUri = Annotated[
    str,
    Field(
        min_length=1,
        max_length=1024,
        json_schema_extra=rules(*uri_rules(DATA_SHAPES, what="a data file"), DATA_FILE, ONE_FILE),
    ),
]
OutputUri = Annotated[
    str,
    Field(
        min_length=1,
        max_length=1024,
        json_schema_extra=rules(*uri_rules(SHAPES, what="an output folder")),
    ),
]
