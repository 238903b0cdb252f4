"""Users' reward functions: Python from a ConfigMap, called as f(prompts, completions, **columns) -> list of numbers.

It is the user's own code in the user's own pod, which holds no token of the cluster. Whatever goes wrong in it is the
user's to correct, so it ends as BadConfig with the place in that file.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import inspect
import io
import linecache
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

from finetune_trainer import signals
from finetune_trainer.data.shapes import AnyExample, Prompt
from finetune_trainer.failures import BadConfig, BadData, Stopped
from finetune_trainer.runfile import RunFile
from finetune_trainer.runparts import RewardFunction

FOLDER_VARIABLE = "FINETUNE_REWARD_FUNCTIONS"
OWN_ARGUMENTS = ("prompts", "completions")


@dataclass(frozen=True)
class Source:
    """A function that is there, as text."""

    place: str  # for people: reward.functions[0] (ConfigMap name, key)
    entry: str
    file: str
    text: str

    @property
    def digest(self) -> str:
        return f"sha256:{hashlib.sha256(self.text.encode()).hexdigest()}"


def find(run: RunFile) -> tuple[Source, ...]:
    """Reads and compiles every function's file without running it. Raises BadConfig with file and line."""
    if run.reward is None:
        return ()
    return tuple(_read(function, number) for number, function in enumerate(run.reward.functions))


def _read(function: RewardFunction, number: int) -> Source:
    reference = function.config_map_ref
    place = f"reward.functions[{number}] (ConfigMap {reference.name}, key {reference.key})"
    folder = os.environ.get(FOLDER_VARIABLE)
    if not folder:
        raise BadConfig(f"{place}: no reward functions are mounted here ({FOLDER_VARIABLE} is not set)")
    path = Path(folder) / str(number) / reference.key
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a mark before the first line
    except FileNotFoundError as error:
        raise BadConfig(f"{place}: there is no file {path}; check the key of the ConfigMap") from error
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfig(f"{place}: {path} cannot be read as UTF-8 text ({error})") from error
    source = Source(place, function.entry, reference.key, text)
    _check_entry(source)
    return source


def _check_entry(source: Source) -> None:
    try:
        tree = ast.parse(source.text, filename=source.file)
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise BadConfig(f"{source.place}: {error.msg}, {source.file} line {error.lineno}: {line}") from error
    defined = [
        node for node in tree.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    ]
    named = next((node for node in defined if node.name == source.entry), None)
    if isinstance(named, ast.AsyncFunctionDef):
        raise BadConfig(f"{source.place}: {source.entry} is async; write it as a plain function")
    if named is None and not _is_assigned(tree, source.entry):
        names = ", ".join(node.name for node in defined) or "none"
        raise BadConfig(
            f"{source.place}: entry {source.entry!r} is not defined in {source.file}, which has: {names}; "
            "name one of its functions"
        )


def _is_assigned(tree: ast.Module, name: str) -> bool:
    """Whether the module binds the name in another way: an import, an assignment, a condition."""
    stored = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    imported = {
        (alias.asname or alias.name)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    inner = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    return name in stored | imported | inner


def check_columns(examples: Sequence[AnyExample], sources: Sequence[Source]) -> None:
    """Raises BadData for a column that has the name of an argument which every function gets anyway."""
    for example in examples:
        if not sources or not isinstance(example, Prompt):
            return
        taken = [name for name in OWN_ARGUMENTS if name in example.columns]
        if taken:
            raise BadData(
                f"{example.where}: column {taken[0]!r} has the name of an argument of reward functions; rename it"
            )


@dataclass(frozen=True)
class Function:
    """A function that can be called."""

    source: Source
    call: Callable[..., Any]
    accepts: frozenset[str] | None  # names of arguments beside the first two; None: any

    @property
    def name(self) -> str:
        return self.source.entry

    def __call__(
        self, prompts: list[Any], completions: list[Any], columns: Mapping[str, list[Any]]
    ) -> list[float]:
        """Returns one finite number per completion. Raises BadConfig for everything else."""
        given = {
            name: value for name, value in columns.items() if self.accepts is None or name in self.accepts
        }
        with _running(self.source):
            values = _as_list(self.call(prompts, completions, **given))
        return _check_values(self.source, values, count=len(completions))


def load(source: Source) -> Function:
    """Runs the file once and returns its function. Raises BadConfig."""
    name = f"<{source.file} of {source.place}>"
    linecache.cache[name] = (len(source.text), None, source.text.splitlines(keepends=True), name)
    # Listed, as dataclasses and pickle look a class's module up; the name is the file's own where there are several.
    module = ModuleType(f"reward_function_{source.digest.removeprefix('sha256:')[:12]}")
    sys.modules[module.__name__] = module
    module.__file__ = name
    # Our own __future__ is not the user's.
    code: CodeType = compile(source.text, name, "exec", dont_inherit=True)
    with _running(source):
        exec(code, module.__dict__)  # noqa: S102  running the user's function is what was asked for
    call = getattr(module, source.entry, None)
    if not callable(call):
        raise BadConfig(f"{source.place}: {source.entry} in {source.file} is no function, but {call!r:.80}")
    return Function(source, call, _accepted(source, call))


def _accepted(source: Source, call: Callable[..., Any]) -> frozenset[str] | None:
    try:
        signature = inspect.signature(call)
        signature.bind_partial([], [])
    except (TypeError, ValueError) as error:
        raise BadConfig(
            f"{source.place}: {source.entry} cannot be called with (prompts, completions, **columns): {error}"
        ) from error
    parameters = signature.parameters.values()
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters):
        return None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(one.name for one in list(parameters)[2:] if one.kind in by_name)


@contextlib.contextmanager
def _running(source: Source) -> Iterator[None]:
    """While a user's code runs: what it raises is BadConfig, and it cannot take away our output, our signals, our
    gradients or our process."""
    with (
        signals.kept(),
        _one_process(),
        _gradients_kept(),
        contextlib.redirect_stdout(_lend(sys.stdout)),
        contextlib.redirect_stderr(_lend(sys.stderr)),
    ):
        try:
            with _interpreter_kept():
                yield
        except Stopped:
            raise
        except BaseException as error:  # it raises what it likes, also KeyboardInterrupt
            raise _failed(source, error) from error


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """os._exit would end the process with the user's code and without a result; processes forked from it may use it,
    and end here if they did not: training, its result and its folders are ours alone."""
    leave, own = os._exit, os.getpid()

    def refuse(status: int) -> None:
        if os.getpid() != own:
            leave(status)
        raise SystemExit(f"os._exit({status!r})")

    os._exit = refuse  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = leave
        if os.getpid() != own:
            leave(1)


@contextlib.contextmanager
def _interpreter_kept() -> Iterator[None]:
    """Warnings as errors, or little room for calls, are for the user's code and would end ours."""
    filters, depth = list(warnings.filters), sys.getrecursionlimit()
    try:
        yield
    finally:
        sys.setrecursionlimit(max(depth, sys.getrecursionlimit()))  # more may be what the function needs
        if warnings.filters != filters:
            warnings.resetwarnings()
            warnings.filters = filters


@contextlib.contextmanager
def _gradients_kept() -> Iterator[None]:
    """Whoever asks a model of his own often switches gradients off for good."""
    torch = sys.modules.get("torch")  # not imported for this: it takes seconds
    before = torch is None or torch.is_grad_enabled()
    try:
        yield
    finally:
        if torch is not None:
            torch.set_grad_enabled(before)


class _Lent(io.TextIOWrapper):
    """Our own stream for somebody else, who may close it: then it is still open."""

    def close(self) -> None:
        self.flush()


def _lend(stream: Any) -> _Lent:
    return _Lent(stream.buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True)


def _failed(source: Source, error: BaseException) -> BadConfig:
    """Names the line of the user's file in which it went wrong, also where a library raised."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename.startswith("<" + source.file)
    ]
    place = f", {source.file} line {frames[-1].lineno}: {(frames[-1].line or '').strip()}" if frames else ""
    last = traceback.format_exception_only(error)[-1].strip()
    return BadConfig(f"{source.place}: {source.entry} failed with {last}{place}")


def _as_list(values: Any) -> Any:
    """Runs what a function with `yield` has only begun; what is no sequence stays as it is."""
    return list(values) if isinstance(values, Iterable) else values


def _check_values(source: Source, items: Any, *, count: int) -> list[float]:
    where = f"{source.place}: {source.entry}"
    if not isinstance(items, list):
        raise BadConfig(f"{where} returned {items!r:.80}; return a list with one number per completion")
    if len(items) != count:
        raise BadConfig(f"{where} returned {len(items)} rewards for {count} completions; return one for each")
    numbers = []
    for index, item in enumerate(items):
        try:
            number = float(item)
        except (TypeError, ValueError, OverflowError):
            raise BadConfig(f"{where} returned {item!r:.80} for completion {index}; return numbers") from None
        if not math.isfinite(number):
            raise BadConfig(f"{where} returned {number} for completion {index}; return finite numbers")
        numbers.append(number)
    return numbers
