"""What operator and routers tell one another: the route snapshot (down) and the counters (up).

The snapshot says everything that a router has to know; a router needs no other source, and two routers with the same
snapshot send the same user to the same arm. Counters are cumulative within an epoch, which is one life of one worker
process (or of one feedback store); whoever reads them takes differences and survives restarts.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from finetune_operator.api.base import StatusModel

ROUTES_VERSION: Literal["routes/v1"] = "routes/v1"
COUNTERS_VERSION: Literal["counters/v1"] = "counters/v1"

# Admin API of a router, each call with `Authorization: Bearer <token>`.
ROUTES_PATH = "/admin/v1/routes"
COUNTERS_PATH = "/admin/v1/counters"

LENGTH_BINS = 16  # of responses by completion tokens: powers of two, the last one open
WORD_BINS = 64  # of words by hash
GROUPS = 32  # of keys, by hash; what is summed by group shows how much the values of one user are alike

# Headers that every answer carries. A client that sends the revision asks for it.
ARM_HEADER = "x-adapter-arm"
REVISION_HEADER = "x-adapter-revision"
FALLBACK_HEADER = "x-adapter-fallback"


class Arm(StrEnum):
    """Side of the comparison that a request belongs to."""

    STABLE = "Stable"
    CANDIDATE = "Candidate"
    SHADOW = "Shadow"  # mirrored to the candidate; the user sees the stable answer


class SignalEvent(StrEnum):
    """What a guardrail counts; at most once per response."""

    ERROR = "error"  # 5xx, no connection, timeout, broken stream; no 4xx of both arms, and no client that went away
    TTFT_OVER = "ttft_over"  # first byte of the body later than `threshold` seconds
    LATENCY_OVER = "latency_over"  # whole answer later than `threshold` seconds
    SCHEMA_INVALID = "schema_invalid"  # the text is not JSON, or not valid against the route's output schema
    EMPTY = "empty_output"  # whole, but no text and no tool call
    TRUNCATED = "truncated"  # finish_reason length
    REFUSAL = "refusal"  # the text begins like a refusal
    REPETITION = "repetition"  # the text repeats one piece over and over
    FLAGGED = "flagged"  # finish_reason content_filter


class RouteModel(StatusModel):
    """A part of the snapshot. A router that is older than its operator must not fail over a new field."""

    model_config = ConfigDict(extra="ignore")


class Target(RouteModel):
    """A revision and where it is loaded."""

    revision: str
    """First 8 hexadecimal digits of the artifact's digest; `base` is the model without an adapter."""
    served_name: str
    """Name that the engines know it by: `<alias>--<revision>`, or the base model's name."""
    upstreams: tuple[str, ...]
    """Base URLs of the engines that have it loaded, for example http://10.0.0.7:8000."""


class HeaderMatch(RouteModel):
    """A header with exactly this value."""

    name: str
    exact: str


class Pin(RouteModel):
    """Requests with all of these headers go to the arm, whatever their key. They are not part of the comparison."""

    headers: tuple[HeaderMatch, ...]
    arm: Literal["Stable", "Candidate"]


class Signal(RouteModel):
    """One thing to count per response."""

    name: str
    event: SignalEvent
    threshold: float | None = None
    """Seconds; only for ttft_over and latency_over."""


class Route(RouteModel):
    """Where requests for one alias go."""

    alias: str
    """The `model` that clients ask for."""
    owner: str
    """`namespace/name/uid` of the AdapterDeployment."""
    stable: Target | None = None
    """None: nothing is ready yet; the router answers 503 with Retry-After."""
    candidate: Target | None = None
    weight: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Percent of the keys that go to the candidate."""
    mirror: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Percent of the stable requests that are sent to the candidate as well; those answers are only counted."""
    sticky: bool = True
    """False: each request is assigned at random."""
    keys: tuple[str, ...] = ("header:x-adapter-key", "body:user", "apiKey")
    """Where the key of a request is looked for, first found wins."""
    salt: str = ""
    pins: tuple[Pin, ...] = ()
    retry_stable: bool = True
    """Whether a candidate that fails before the first byte is retried on the stable arm."""
    signals: tuple[Signal, ...] = ()
    output_schema: dict[str, object] | None = None
    """JSON schema of the answer's text, for schema_invalid."""
    counts_words: bool = False
    """Whether the first words of answers are counted by hash, for drift."""
    grouped: tuple[str, ...] = ()
    """Quantities that are also summed by group of keys, for the objectives: `seconds`, `ttft_seconds`,
    `completion_tokens`, or `scores/<metric>`."""
    comparison: str = ""
    """Identity of the comparison under way. The distinct-key sample starts anew when it changes."""


class BaseModelRoute(RouteModel):
    """A base model that clients may ask for by its own name."""

    name: str
    upstreams: tuple[str, ...]


class Snapshot(RouteModel):
    """All routes, as of one version."""

    api_version: Literal["routes/v1"] = ROUTES_VERSION
    version: Annotated[int, Field(ge=0)] = 0
    """Grows with every change; a router refuses to go back."""
    routes: tuple[Route, ...] = ()
    base_models: tuple[BaseModelRoute, ...] = ()


class Moments(RouteModel):
    """Count, sum and sum of squares of a quantity."""

    n: int = 0
    sum: float = 0.0
    sum_squares: float = 0.0
    groups: tuple[tuple[int, float], ...] = ()
    """Count and sum of each of the `GROUPS` groups of keys, where the route asks for them: of the values since then."""


class ArmCounters(RouteModel):
    """What one epoch saw of one arm of one alias, cumulative. Pinned requests are not in it."""

    alias: str
    arm: Arm
    revision: str
    requests: int = 0
    """Answered or failed; neither the client's own 4xx nor its disconnects."""
    events: dict[str, int] = Field(default_factory=dict)
    """Signal name -> responses that had it."""
    watched: dict[str, int] = Field(default_factory=dict)
    """Signal name -> responses of which it is known whether they have it: from its event on, else from their end on."""
    seconds: Moments = Moments()
    """Time to the last byte, in seconds."""
    ttft_seconds: Moments = Moments()
    """Time to the first byte of the body, in seconds."""
    completion_tokens: Moments = Moments()
    length_histogram: tuple[int, ...] = ()
    """Responses by completion tokens: [0, 1), [1, 2), [2, 4), ... powers of two, 16 bins, the last one open."""
    word_histogram: tuple[int, ...] = ()
    """The first 32 words of each response by hash, 64 bins; only where the route asks for it."""
    fallbacks: int = 0
    """Candidate requests that the stable arm answered in the end."""
    scores: dict[str, Moments] = Field(default_factory=dict)
    """Feedback metric -> its values (booleans are 0 and 1). Only in the epoch of a feedback store."""


class KeySample(RouteModel):
    """A uniform sample of the distinct keys of one comparison: those with the smallest hashes (k minimum values,
    Bar-Yossef et al. 2002). Samples of several epochs are merged by union, smallest `limit` first."""

    alias: str
    comparison: str
    limit: int = 1024
    stable: tuple[int, ...] = ()
    """Hashes (unsigned 53 bit) of sampled keys whose outcome was recorded for the stable arm."""
    candidate: tuple[int, ...] = ()


class EpochCounters(RouteModel):
    """One life of one worker process, or of one feedback store."""

    epoch: str
    arms: tuple[ArmCounters, ...] = ()
    samples: tuple[KeySample, ...] = ()


class RouterCounters(RouteModel):
    """Answer of GET /admin/v1/counters: all that a router replica has counted."""

    api_version: Literal["counters/v1"] = COUNTERS_VERSION
    instance: str
    """Identity of the replica, kept over restarts where its state folder is kept."""
    version: int
    """Version of the snapshot that every worker applies."""
    epochs: tuple[EpochCounters, ...] = ()


class RoutesApplied(RouteModel):
    """Answer of PUT and GET /admin/v1/routes."""

    instance: str
    version: int
