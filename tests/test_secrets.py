"""Secrets: no file and no output of a command holds one, whether it ends well or not."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click
import pytest
from builders import manifest as trace_manifest
from builders import text_traces
from click.testing import CliRunner, Result
from openai_server import OpenAIServer
from pydantic import SecretStr
from scenarios import LINEAR

from calibration.common.errors import CalibrationError
from calibration.common.secrets import HIDDEN, concealed, redacted, without_secrets
from calibration.common.toml import dumps
from calibration.measured import MeasuredRun
from calibration.observe.client import Client, RefusedError
from paceline.cli import main

KEY = "q7Zr-open-sesame-42"

LEAKS = [
    ["--api-key", KEY],
    [f"--api-key={KEY}"],
    ["--api_key", KEY],
    ["--api-key", f"-{KEY}"],
    ["--hf-token", KEY],
    ["--password", KEY],
    ["--header", f"Authorization: Bearer {KEY}"],
    ["--header", f"authorization:Basic {KEY}"],
    ["-H", f"X-Api-Key: {KEY}"],
    ["--url", f"http://user:{KEY}@host:8000/v1"],
    ["--url", f"https://{KEY}@host/v1"],
    ["--url", f"http://host/v1?x=1&api_key={KEY}&y=2"],
    ["--url", f"http://host/v1?key={KEY}#top"],
    [f"HF_TOKEN={KEY}"],
    ["--env", f"OPENAI_API_KEY={KEY}"],
    [f'{{"api_key": "{KEY}", "x": 1}}'],
    ["--api-key", KEY, "--out", f"runs/{KEY}/here"],
]


@pytest.mark.parametrize("words", LEAKS, ids=" ".join)
def test_secrets_in_a_command_are_redacted(words: list[str]) -> None:
    assert KEY not in " ".join(redacted(words))
    assert HIDDEN in " ".join(redacted(words))
    recorded = without_secrets(shlex.join(["paceline", "observe", *words]))
    assert KEY not in recorded
    assert trace_manifest().model_validate_json(
        trace_manifest().model_dump_json().replace('"tests"', f'"paceline --api-key {KEY}"')
    ).command == shlex.join(["paceline", "--api-key", HIDDEN])


@pytest.mark.parametrize(
    "token",
    [
        "hf_" + "aB3" * 11,
        "sk-proj-abc123DEF456",
        "sk-" + "a" * 24,
        "ghp_" + "x1" * 18,
        "gsk_a1b2c3d4e5",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiI0In0.sig",
    ],
)
def test_tokens_that_their_form_gives_away_are_redacted_anywhere(token: str) -> None:
    for text in (token, f"refused: {token} is not known", f"Bearer {token}", f"models/{token}"):
        assert token not in concealed(text)


@pytest.mark.parametrize(
    "words",
    [
        [
            "observe",
            "--api-key-env",
            "MY_KEY",
            "--tokenizer",
            "folder",
            "--draft-tokens",
            "4",
            "--token-budgets",
            "1,2",
        ],
        ["--drafter-cost", "eagle=2.135e-3,0.84e-6,per_round", "--slo", "tpot_ms=400,ttft_ms=4000"],
        ["stopping.draft_tokens=1,2,4", "--url", "http://host:8000/v1", "--max-new-tokens", "10"],
        ["hf_traces/run", "disk-01/task-sk", "sk-learn", "keys.md", "--lengths", "512,131072,65536"],
    ],
)
def test_what_is_no_secret_stays_as_it_was_typed(words: list[str]) -> None:
    assert redacted(words) == words
    assert without_secrets("paceline  'not   normalised'") == "paceline  'not   normalised'"


def test_no_option_of_a_command_is_taken_for_a_secret_but_the_key() -> None:
    def options(command: click.Command) -> set[str]:
        found = {name for one in command.params if isinstance(one, click.Option) for name in one.opts}
        if isinstance(command, click.Group):
            found |= {name for inner in command.commands.values() for name in options(inner)}
        return found

    hidden = {name for name in options(main) if redacted([name, "value"]) == [name, HIDDEN]}
    assert hidden == {"--api-key"}


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    text_traces().write(tmp_path / "traces")
    tables: dict[str, Any] = {"name": "plain", "traces": {"path": "traces"}, "costs": {"verifier": LINEAR}}
    tables |= {"engine": {"max_num_seqs": 2}, "workload": {"kind": "closed", "concurrency": 2, "requests": 3}}
    (tmp_path / "plain.toml").write_text(dumps(tables), encoding="utf-8")
    return tmp_path / "plain.toml"


def observed(plain: Path, url: str, *words: str) -> Result:
    command = ["observe", "--url", url, "--fit", str(plain), "--out", str(plain.parent / "out"), "--repeats", "1"]
    return CliRunner().invoke(main, [*command, *words])


def clean(folder: Path, done: Result) -> None:
    """Nothing below `folder` and nothing that was said holds the key."""
    assert KEY not in done.output
    for file in folder.rglob("*"):
        assert KEY not in str(file)
        assert not file.is_file() or KEY.encode() not in file.read_bytes()


@pytest.mark.parametrize("how", ["option", "joined", "variable", "default variable"])
def test_a_key_opens_the_server_and_is_written_nowhere(
    plain: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY" if how == "default variable" else "TEAM_KEY", f" {KEY}\n")
    words = {
        "option": ["--api-key", KEY],
        "joined": [f"--api-key={KEY}"],
        "variable": ["--api-key-env", "TEAM_KEY"],
        "default variable": [],
    }[how]
    with OpenAIServer(api_key=KEY) as server:
        done = observed(plain, server.url, *words)
    assert done.exit_code == 0, done.output
    clean(plain.parent, done)
    command = MeasuredRun.read(plain.parent / "out" / "plain").manifest.command
    assert command.startswith("paceline observe --url")
    assert ("TEAM_KEY" in command) == (how == "variable")
    assert (HIDDEN in command) == (how in ("option", "joined"))


def test_a_password_in_the_address_is_sent_and_written_nowhere(plain: Path) -> None:
    with OpenAIServer() as server:
        done = observed(plain, server.url.replace("://", f"://user:{KEY}@"))
        url = server.url.replace("://", f"://{HIDDEN}@")
    assert done.exit_code == 0, done.output
    clean(plain.parent, done)
    assert shlex.quote(url) in MeasuredRun.read(plain.parent / "out" / "plain").manifest.command


def test_a_key_that_is_refused_is_not_told(plain: Path) -> None:
    with OpenAIServer(api_key="another") as server:
        done = observed(plain, server.url, "--api-key", KEY)
    assert done.exit_code == 1
    assert "got 401: invalid key" in done.output
    clean(plain.parent, done)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (
            ["--api-key-env", "NO_SUCH_VARIABLE"],
            1,
            "--api-key-env: must name an environment variable that holds a key",
        ),
        (["--api-key-env", "NO_SUCH_VARIABLE", "--api-key", KEY], 2, "give --api-key-env or --api-key, one of them"),
        (["--api-key", f"{KEY} é"], 1, "api key: must be printable ASCII without spaces"),
        (["--api-key", f"{KEY}\nX: y"], 1, "api key: must be printable ASCII without spaces"),
        (["--api-key", KEY, KEY], 2, "Got unexpected extra argument"),
        (["--api-key", KEY, "--endpoint", KEY], 2, "Invalid value for '--endpoint'"),
        (["--api-key", KEY, "--model", KEY], 1, "cannot connect"),
    ],
)
def test_faults_of_a_call_do_not_tell_the_key(plain: Path, words: list[str], status: int, message: str) -> None:
    done = observed(plain, "http://127.0.0.1:9", *words)
    assert (done.exit_code, message in " ".join(done.output.split())) == (status, True), done.output
    clean(plain.parent, done)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"http://user:{KEY}@127.0.0.1:9/v1", "http://127.0.0.1:9/v1/models: cannot connect"),
        (f"http://127.0.0.1:9/v1?api_key={KEY}", "url: must have no query"),
        (f"ftp://user:{KEY}@host", "url: must begin with http:// or https://"),
        (f"http://user:{KEY}@host:port", "must be an address"),
    ],
)
def test_addresses_with_secrets_are_told_without_them(plain: Path, url: str, message: str) -> None:
    done = observed(plain, url)
    assert done.exit_code == 1
    assert message in " ".join(done.output.split())
    clean(plain.parent, done)


def test_an_unforeseen_fault_does_not_tell_the_key(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **options: Any) -> None:
        raise RuntimeError(f"sent {options['api_key'].get_secret_value()}")

    monkeypatch.setattr("calibration.observe.run.observe", broken)
    done = observed(plain, "http://127.0.0.1:9", "--api-key", KEY)
    assert done.exit_code == 1
    assert f"RuntimeError: sent {HIDDEN}" in done.output
    clean(plain.parent, done)
    monkeypatch.setenv("SOME_KEY", KEY)
    done = observed(plain, "http://127.0.0.1:9", "--api-key-env", "SOME_KEY")
    assert f"RuntimeError: sent {HIDDEN}" in done.output
    clean(plain.parent, done)


def test_a_client_does_not_show_what_it_knows() -> None:
    client = Client(f"http://me:{KEY}@host/v1", api_key=SecretStr(KEY + "2"))
    assert client.url == "http://host"
    assert KEY not in repr(vars(client))
    fault = RefusedError("http://host", 401, f'{{"error": {{"message": "no such key {KEY}"}}}}'.encode(), [KEY])
    assert str(fault).endswith(f"got 401: no such key {HIDDEN}")
    with pytest.raises(CalibrationError, match="must begin with http") as caught:
        Client(f"user:{KEY}@host")
    assert KEY not in str(caught.value)
