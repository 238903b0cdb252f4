"""What clients may send: OpenAI's fields, vLLM's additions, and a clear no to what would be ignored otherwise.

https://platform.openai.com/docs/api-reference/chat, https://docs.vllm.ai/en/stable/serving/openai_compatible_server/
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune_server.errors import BadRequest
from finetune_server.sampling import MAX_LOGPROBS, Sampling

MAX_STOPS = 16
MAX_MESSAGES = 10_000  # 50 ms, in which nothing else is done
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
# Of a long list, each item that does not fit would become an error of its own: seconds in which nothing else is done.
Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]

# Fields that change the answer and that this engine does not have: their neutral values are accepted.
_REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "best_of": (None, 1),
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "logit_bias": (None, {}),
    "echo": (None, False),
    "suffix": (None, ""),
    "repetition_penalty": (None, 1),
    "use_beam_search": (None, False),
    "prompt_logprobs": (None,),
    "prompt_embeds": (None,),
    "structured_outputs": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "allowed_token_ids": (None,),
    "bad_words": (None, []),
    "min_tokens": (None, 0),
    "chat_template": (None,),
    "truncate_prompt_tokens": (None,),
    "include_stop_str_in_output": (None, False),
    "skip_special_tokens": (None, True),
    "return_token_ids": (None, False),
    "logits_processors": (None, []),
    "audio": (None,),
}


class Request(BaseModel):
    """Fields of both APIs. Unknown ones are ignored, as vLLM does."""

    model_config = ConfigDict(extra="ignore")

    model: str
    stream: bool | None = None  # null is OpenAI's "not set" in every field
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[Items[Stop], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: Items[int] | None = None
    ignore_eos: bool | None = None

    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def sampling(self, *, max_tokens: int, defaults: dict[str, Any], logprobs: int | None) -> Sampling:
        """Returns the settings of generation; `defaults` are the model's own."""

        def pick(name: str, otherwise: float) -> float:
            value = getattr(self, name)
            return float(defaults.get(name, otherwise) if value is None else value)

        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return Sampling(
            max_tokens=max_tokens,
            temperature=pick("temperature", 1.0),
            top_p=pick("top_p", 1.0),
            top_k=max(0, int(pick("top_k", 0))),
            min_p=pick("min_p", 0.0),
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            seed=self.seed,
            stop=tuple(stops),
            stop_token_ids=frozenset(self.stop_token_ids or []),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
        )


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore")

    include_usage: bool | None = None


class TextPart(BaseModel):
    """A piece of a message's content."""

    model_config = ConfigDict(extra="ignore")

    type: str
    text: str = ""


class Message(BaseModel):
    model_config = ConfigDict(extra="allow")  # templates may read more than role and content

    role: str
    content: str | Items[TextPart] | None = None

    def render(self) -> dict[str, Any]:
        """Returns the message with its content as one text. Raises BadRequest for images and the like."""
        content = self.content
        if isinstance(content, list):
            other = next((part.type for part in content if part.type != "text"), None)
            if other is not None:
                raise BadRequest(
                    f"messages: content of type {other!r} is not supported; send text", "messages"
                )
            content = "\n".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content or ""}


class ChatRequest(Request):
    messages: Items[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None

    def logprob_count(self) -> int | None:
        """Returns how many alternatives to tell per token; None: no log-probabilities. Raises BadRequest."""
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("top_logprobs needs logprobs: true", "top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Request):
    prompt: (
        str
        | Annotated[Items[int], Field(min_length=1)]
        | Annotated[Items[str], Field(min_length=1, max_length=64)]
        | Annotated[Items[Annotated[Items[int], Field(min_length=1)]], Field(min_length=1, max_length=64)]
    )
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool = True

    def prompts(self) -> list[Any]:
        """Returns the prompts, each a text or a list of tokens; each gets one answer."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


T = TypeVar("T", bound=Request)


def parse(content: bytes, kind: type[T]) -> T:
    """Returns the request. Raises BadRequest, which names the field and never repeats what the client sent."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        raise BadRequest("the body is not valid JSON") from None
    if not isinstance(document, dict):
        raise BadRequest("the body is not a JSON object")
    for name, neutral in _REFUSED.items():
        if document.get(name) not in neutral:
            raise BadRequest(_describe_refused(name), name)
    _check_format(document.get("response_format"))
    try:
        return kind.model_validate(document)
    except ValidationError as error:
        told = error.errors(include_input=False, include_url=False, include_context=False)
        # Where a field may have several types, the type that fits but is too long says more than those that do not.
        first = next((one for one in told if one["type"].endswith(("too_long", "too_short"))), told[0])
        place = ".".join(str(part) for part in first["loc"])
        raise BadRequest(f"{place}: {first['msg']}", str(first["loc"][0]) if first["loc"] else None) from None


def _check_format(asked: Any) -> None:
    """A schema that is not strict is a wish, as in OpenAI's API: the router or the client looks whether it came true.

    Raises BadRequest for what promises something of the answer, and nothing here can force it.
    """
    if asked is None or asked == {"type": "text"}:
        return
    wish = (
        asked.get("json_schema") if isinstance(asked, dict) and asked.get("type") == "json_schema" else None
    )
    if not isinstance(wish, dict) or not isinstance(wish.get("schema"), dict) or wish.get("strict"):
        raise BadRequest(
            "response_format: this engine cannot force an answer into a form; leave it out, send a json_schema with "
            "its schema and without strict, which the answer may differ from, or use vLLM",
            "response_format",
        )


def _describe_refused(name: str) -> str:
    if name in ("n", "best_of"):
        return f"{name}: this engine gives one choice per request; leave it out, or send several requests"
    return f"{name}: this engine does not have it; leave it out, or use vLLM"
