"""What a laptop cluster remembers between commands."""

from __future__ import annotations

import dataclasses
import json
import uuid
from pathlib import Path

from finetune_local import errors, layouts


@dataclasses.dataclass
class Instance:
    """`identity` marks its processes and comes from the folder's path, so that they are found even when somebody
    removed what is in it; `wanted` are the parts that `up` was asked for; `files` is the folder behind the claim of
    that name; `engine_model` is the URI of the engine's base model.
    """

    identity: str
    ports: dict[str, int]
    wanted: list[str]
    files: str | None = None
    engine_model: str | None = None

    @classmethod
    def load(cls, path: Path) -> Instance:
        """The instance in a file, or a new one where there is none. Raises LocalClusterError for a broken file."""
        try:
            return cls(**json.loads(path.read_text()))
        except FileNotFoundError:
            identity = uuid.uuid5(uuid.NAMESPACE_URL, path.parent.resolve().as_uri()).hex
            return cls(identity=identity, ports={}, wanted=[])
        except (ValueError, TypeError) as error:
            raise errors.LocalClusterError(
                f"{path} cannot be read: {error}", remedy="Remove the state folder's content and start anew."
            ) from error

    def save(self, path: Path) -> None:
        layouts.write_private(path, json.dumps(dataclasses.asdict(self), indent=1))
