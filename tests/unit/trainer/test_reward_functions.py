"""Users' reward functions: how they are called, and how each way to go wrong is told, with the line."""

from __future__ import annotations

import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_trainer import runfile, signals
from finetune_trainer.data.shapes import Prompt
from finetune_trainer.failures import BadConfig, BadData, Stopped
from finetune_trainer.rewards import functions
from tests import tiny


def run_file(*entries: str) -> runfile.RunFile:
    reward = {
        "functions": [
            {"configMapRef": {"name": "rewards", "key": "r.py"}, "entry": entry} for entry in entries
        ]
    }
    document = tiny.run_document(
        Path("/model"),
        Path("/rows.jsonl"),
        Path("/out"),
        objective="GRPO",
        reward=reward,
        hyperparameters={"globalBatchSize": 8, "maxLength": 256},
    )
    return runfile.parse(json.dumps(document))


@pytest.fixture
def find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Mounts a file as the pod has it and returns the function `f` (or another entry) of it, unloaded."""
    monkeypatch.setenv(functions.FOLDER_VARIABLE, str(tmp_path))

    def find(text: str, *, entry: str = "f") -> functions.Source:
        (tmp_path / "0").mkdir(exist_ok=True)
        (tmp_path / "0" / "r.py").write_text(text)
        (source,) = functions.find(run_file(entry))
        return source

    return find


@pytest.fixture
def handlers() -> Iterator[None]:
    """The signal handlers of the command; pytest's own come back."""
    with signals.kept():
        signals.install()
        yield


def test_a_function_gets_the_columns_that_it_asks_for(find: Any) -> None:
    text = (
        "def f(prompts, completions, number):\n    return [len(c) + n for c, n in zip(completions, number)]\n"
    )
    function = functions.load(find(text))
    assert function(["a", "b"], ["xx", "y"], {"number": [1, 2], "other": [3, 4]}) == [3.0, 3.0]
    everything = functions.load(
        find("def f(prompts, completions, **columns):\n    return [len(columns)] * 2\n")
    )
    assert everything(["a", "b"], ["xx", "y"], {"number": [1, 2], "other": [3, 4]}) == [2.0, 2.0]


def test_an_entry_may_be_imported_or_assigned(find: Any) -> None:
    text = (
        "import functools\ndef g(prompts, completions, k):\n    return [k] * len(completions)\n"
        "f = functools.partial(g, k=2)\n"
    )
    assert functions.load(find(text))(["a"], ["b"], {}) == [2.0]


@pytest.mark.parametrize("beginning", ["", "from __future__ import annotations\n", "\ufeff"])
def test_a_file_may_hold_what_a_module_holds(find: Any, beginning: str) -> None:
    text = (
        f"{beginning}import dataclasses\n@dataclasses.dataclass\nclass Score:\n    value: int = 3\n"
        "def f(prompts, completions):\n    for _ in completions:\n        yield Score().value\n"
    )
    assert functions.load(find(text))(["a", "b"], ["x", "y"], {}) == [3.0, 3.0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("def f(prompts, completions)\n    return []\n", ["expected ':'", "r.py line 1", "def f("]),
        ("def g(prompts, completions):\n    return []\n", ["entry 'f' is not defined in r.py", "has: g"]),
        ("", ["which has: none"]),
        ("async def f(prompts, completions):\n    return []\n", ["f is async", "plain function"]),
    ],
)
def test_a_wrong_file_is_refused_without_running_it(find: Any, text: str, expected: list[str]) -> None:
    with pytest.raises(BadConfig) as caught:
        find(text)
    for part in ("reward.functions[0] (ConfigMap rewards, key r.py)", *expected):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "import no_such_module\ndef f(prompts, completions):\n    return []\n",
            ["ModuleNotFoundError", "line 1"],
        ),
        ("f = 3\n", ["f in r.py is no function, but 3"]),
        ("def f(prompts):\n    return []\n", ["cannot be called with (prompts, completions, **columns)"]),
        ("raise SystemExit(2)\ndef f(prompts, completions):\n    return []\n", ["SystemExit: 2", "line 1"]),
        (
            "raise KeyboardInterrupt\ndef f(prompts, completions):\n    return []\n",
            ["KeyboardInterrupt, r.py"],
        ),
    ],
)
def test_a_file_that_fails_as_it_is_loaded(find: Any, text: str, expected: list[str]) -> None:
    source = find(text)
    with pytest.raises(BadConfig) as caught:
        functions.load(source)
    for part in expected:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("x = 1\n    return [1 / 0]", ["ZeroDivisionError: division by zero", "r.py line 3: return [1 / 0]"]),
        ("return [int(c) for c in completions]", ["ValueError: invalid literal", "line 2"]),
        ("import json\n    return [json.loads('{')]", ["JSONDecodeError", "r.py line 3: return [json"]),
        ("return [1.0]", ["returned 1 rewards for 2 completions"]),
        ("return None", ["returned None", "a list with one number per completion"]),
        ("return [1.0, float('nan')]", ["returned nan for completion 1", "finite"]),
        ("return ['good', 1]", ["returned 'good' for completion 0", "numbers"]),
        ("return [None, 1]", ["returned None for completion 0"]),
        ("return [10**400, 1]", ["returned 1000", "for completion 0; return numbers"]),
        ("yield 1 / 0", ["ZeroDivisionError: division by zero", "r.py line 2: yield 1 / 0"]),
        ("raise KeyboardInterrupt", ["failed with KeyboardInterrupt, r.py line 2"]),
        ("raise GeneratorExit", ["failed with GeneratorExit, r.py line 2"]),
        ("__import__('os')._exit(0)", ["failed with SystemExit: os._exit(0), r.py line 2"]),
    ],
)
def test_a_function_that_fails_names_its_line(find: Any, body: str, expected: list[str]) -> None:
    function = functions.load(find(f"def f(prompts, completions):\n    {body}\n"))
    with pytest.raises(BadConfig) as caught:
        function(["a", "b"], ["x", "y"], {})
    for part in ("reward.functions[0]", *expected):
        assert part in str(caught.value)


def test_processes_that_a_function_forks_end_as_they_like(find: Any) -> None:
    text = (
        "import multiprocessing\ndef f(prompts, completions):\n"
        "    child = multiprocessing.get_context('fork').Process(target=int)\n"
        "    child.start()\n    child.join()\n    return [child.exitcode] * len(completions)\n"
    )
    assert functions.load(find(text))(["a"], ["x"], {}) == [0.0]
    assert os._exit.__module__ == "posix"


@pytest.mark.parametrize("way", ["return [2.0]", "1 / 0"])
def test_a_process_that_a_function_forks_does_not_go_on_as_ours(find: Any, way: str) -> None:
    """It would train, report and remove folders beside us."""
    wait = "return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])]"
    text = f"import os\ndef f(prompts, completions):\n    child = os.fork()\n    if child:\n        {wait}\n    {way}\n"
    function, ours, values = functions.load(find(text)), os.getpid(), []
    try:
        values = function(["a"], ["x"], {})
    finally:
        if os.getpid() != ours:
            os._exit(7)
    assert values == [1.0]


def test_a_process_that_a_function_forks_can_be_terminated(find: Any, handlers: None) -> None:
    """As a pool of processes does when it is closed; ours only notes the signal."""
    text = (
        "import multiprocessing, signal\ncontext = multiprocessing.get_context('fork')\n"
        "def wait(ready):\n    ready.set()\n    signal.pause()\n"
        "def f(prompts, completions):\n"
        "    ready = context.Event()\n    child = context.Process(target=wait, args=(ready,))\n"
        "    child.start()\n    ready.wait()\n    child.terminate()\n    child.join(30)\n"
        "    code = child.exitcode\n    child.kill()\n    return [code or 0]\n"
    )
    with signals.noted():
        assert functions.load(find(text))(["a"], ["x"], {}) == [-signal.SIGTERM]


def test_a_function_cannot_take_our_gradients_away(find: Any) -> None:
    import torch

    off = "torch.set_grad_enabled(False)"
    function = functions.load(
        find(f"import torch\n{off}\ndef f(prompts, completions):\n    {off}\n    return [1.0]\n")
    )
    with torch.enable_grad():
        assert function(["a"], ["x"], {}) == [1.0]
        assert torch.is_grad_enabled()


@pytest.mark.parametrize("at", ["load", "call"])
def test_a_function_cannot_turn_our_warnings_into_errors_nor_take_our_room_for_calls(
    find: Any, at: str
) -> None:
    strict = "warnings.simplefilter('error'); sys.setrecursionlimit(len(inspect.stack()) + 60)"
    before, inside = (strict, "pass") if at == "load" else ("", strict)
    depth, filters = sys.getrecursionlimit(), list(warnings.filters)
    text = f"import inspect, sys, warnings\n{before}\ndef f(prompts, completions):\n    {inside}\n    return [1.0]\n"
    function = functions.load(find(text))
    assert function(["a"], ["x"], {}) == [1.0]
    assert (sys.getrecursionlimit(), warnings.filters) == (depth, filters)


def test_more_room_for_calls_stays_for_the_function(find: Any) -> None:
    depth = sys.getrecursionlimit()
    deep = "def down(n):\n    return n and down(n - 1)\n"
    text = (
        f"import sys\nsys.setrecursionlimit({depth + 500})\n{deep}"
        f"def f(prompts, completions):\n    return [down({depth + 100})]\n"
    )
    try:
        assert functions.load(find(text))(["a"], ["x"], {}) == [0.0]
    finally:
        sys.setrecursionlimit(depth)


def test_an_alarm_that_a_function_forgets_does_not_ring_in_training(find: Any) -> None:
    ours, timer = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)
    text = (
        "import signal\ndef f(prompts, completions):\n"
        "    signal.signal(signal.SIGALRM, print)\n    signal.alarm(3600)\n    return [1.0]\n"
    )
    try:
        assert functions.load(find(text))(["a"], ["x"], {}) == [1.0]
        assert (signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)) == (ours, timer)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, ours)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize(
    "action",
    ["sys.{0} = None", "sys.{0}.close()", "sys.{0} = __import__('io').StringIO()", "with sys.{0}: pass"],
)
def test_a_function_cannot_take_our_output_away(find: Any, capfd: Any, name: str, action: str) -> None:
    body = f"print('scored', file=sys.{name})\n    {action.format(name)}\n    return [1.0]\n"
    function = functions.load(find(f"import sys\ndef f(prompts, completions):\n    {body}"))
    for _ in range(2):
        assert function(["a"], ["x"], {}) == [1.0]
        print("ours", file=getattr(sys, name), flush=True)
    assert getattr(capfd.readouterr(), "out" if name == "stdout" else "err") == "scored\nours\n" * 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_function_cannot_take_our_signals_away(find: Any, number: signal.Signals) -> None:
    """ray.init() sets a handler for SIGTERM that ends the process without a checkpoint."""
    ours = signal.getsignal(number)
    take = f"signal.signal({int(number)}, signal.SIG_IGN)"
    text = f"import signal\n{take}\ndef f(prompts, completions):\n    {take}\n    return [1.0]\n"
    function = functions.load(find(text))
    assert signal.getsignal(number) == ours
    assert function(["a"], ["x"], {}) == [1.0]
    assert signal.getsignal(number) == ours


def test_a_signal_ends_a_function_as_it_ends_everything_else(find: Any) -> None:
    function = functions.load(
        find(
            "from finetune_trainer.failures import Stopped\ndef f(prompts, completions):\n    raise Stopped(15)\n"
        )
    )
    with pytest.raises(Stopped):
        function(["a"], ["x"], {})


def test_a_column_with_the_name_of_an_argument_is_refused(find: Any) -> None:
    source = find("def f(prompts, completions):\n    return []\n")
    rows = [Prompt("q", "rows.jsonl line 7", {"completions": "x"})]
    with pytest.raises(BadData, match=r"rows.jsonl line 7: column 'completions'.*rename it"):
        functions.check_columns(rows, [source])
    functions.check_columns(rows, [])


def test_functions_that_are_not_mounted_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(functions.FOLDER_VARIABLE, raising=False)
    with pytest.raises(BadConfig, match="no reward functions are mounted here"):
        functions.find(run_file("f"))
    monkeypatch.setenv(functions.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(BadConfig, match="check the key of the ConfigMap"):
        functions.find(run_file("f"))


def test_the_digest_is_that_of_the_text(find: Any) -> None:
    one, other = (find(f"def f(prompts, completions):\n    return [{n}]\n").digest for n in (1, 2))
    assert one != other
    assert one.startswith("sha256:")
