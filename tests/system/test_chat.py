"""`hub chat` as a person uses it: against a running server, and with one of its own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

from tests.system.conftest import BASE, HUB, environment, hub, serving


def chat(home: Path, said: str, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*HUB, "chat", *arguments],
        env=environment(home, **env),
        input=said,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def test_a_chat_answers_in_words_and_says_what_served_it(
    home: Path, random_adapter: Callable[[str, int], Path]
) -> None:
    hub(home, "push", random_adapter("lora", 1), "bot")
    with serving(home, env={"MULTIGRAFT_API_KEY": "secret"}) as server:
        done = chat(home, "hello\nwhat is an adapter?\n\n", BASE, "--url", server.url, MULTIGRAFT_API_KEY="secret")
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("[the bare base]") == 2
        assert len(done.stdout.split()) > 10
        grafted = chat(home, "hello\n", "bot", "--url", server.url, MULTIGRAFT_API_KEY="secret")
        assert "[bot@1]" in grafted.stdout
        unknown = chat(home, "hello\n", "nobody", "--url", server.url, MULTIGRAFT_API_KEY="secret")
        assert (unknown.returncode, "nobody" in unknown.stderr) == (1, True)
        locked = chat(home, "hello\n", BASE, "--url", server.url)
        assert (locked.returncode, "Traceback" in locked.stderr) == (1, False)
    gone = chat(home, "hello\n", BASE, "--url", server.url)
    assert gone.returncode == 1
    assert gone.stderr.startswith("hub chat: no answer from")


def test_a_chat_without_a_server_starts_one_with_the_adapters_base(
    home: Path, random_adapter: Callable[[str, int], Path]
) -> None:
    hub(home, "push", random_adapter("lora", 1), "bot")
    done = chat(home, "hello\n", "bot@1")
    assert done.returncode == 0, done.stderr
    assert "[bot@1]" in done.stdout
