"""What rows say, in shapes that no longer depend on the format of their file.

Chat: turns, of which the assistant's are learnt. Pair: a prompt and the text that follows it; Text is a pair
without prompt. Preference: two such answers to one prompt. Prompt: what the model is to answer by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from finetune_trainer.data.cells import Turn
from finetune_trainer.failures import BadConfig
from finetune_trainer.runfile import ApplyChatTemplate

NO_TEMPLATE = (
    "model.chatTemplate: {cause}, but the model's tokenizer has no chat template; "
    'set model.chatTemplate to "ChatML" or to a Jinja template, or use data without messages'
)


@dataclass(frozen=True)
class Chat:
    turns: tuple[Turn, ...]
    context: int  # number of leading turns that are never learnt (the prompt of PromptCompletion)
    where: str


@dataclass(frozen=True)
class Pair:
    prompt: str  # raw text that is not learnt; empty for Text
    completion: str
    chat_prompt: str | None  # the user's turn when a chat template is applied; None: never as chat (Text)
    where: str


Example = Chat | Pair


@dataclass(frozen=True)
class Preference:
    chosen: Example
    rejected: Example

    @property
    def where(self) -> str:
        return self.chosen.where


@dataclass(frozen=True)
class Prompt:
    given: str | tuple[Turn, ...]  # as the row has it
    where: str
    columns: dict[str, Any] = field(default_factory=dict)  # the row's other columns, for reward functions


AnyExample = Example | Preference | Prompt


def is_chat(*, choice: ApplyChatTemplate, has_template: bool) -> bool:
    """Says whether a text prompt is written as a user's turn. Raises BadConfig for Always without a template."""
    if choice is ApplyChatTemplate.ALWAYS and not has_template:
        raise BadConfig(NO_TEMPLATE.format(cause="dataset.applyChatTemplate is Always"))
    return has_template and choice is not ApplyChatTemplate.NEVER


def as_chat(pair: Pair, *, choice: ApplyChatTemplate, has_template: bool) -> bool:
    """Says whether a pair is written as chat turns. Raises BadConfig for Always without a template."""
    return pair.chat_prompt is not None and is_chat(choice=choice, has_template=has_template)


def as_turns(prompt: Prompt, *, has_template: bool, choice: ApplyChatTemplate) -> tuple[Turn, ...] | None:
    """Returns the prompt as messages, None when it stays text. Raises BadConfig where a template is missing."""
    if not isinstance(prompt.given, str):
        if not has_template:
            raise BadConfig(NO_TEMPLATE.format(cause=f"{prompt.where} holds messages"))
        return prompt.given
    if is_chat(choice=choice, has_template=has_template):
        return ({"role": "user", "content": prompt.given},)
    return None
