"""Secrets stay out of what is written and said: one place that knows what a secret looks like.

`redacted` is for a command line, `concealed` for any text (an error, a warning, a traceback). Both put `HIDDEN` in
the place of users and keys in addresses (``user:password@host``, ``?api_key=X``) and of tokens that their form gives
away (``hf_...``, ``sk-...``, ``Bearer X``); in a command line also of the values of options, variables and headers
named like a secret (``--api-key X``, ``--api-key=X``, ``HF_TOKEN=X``, ``Authorization: X``), wherever else in it they
stand.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated

from pydantic import AfterValidator, SecretStr

HIDDEN = "[redacted]"
_LEAST = 4
"""Characters that a value needs to be looked for elsewhere: shorter ones stand in other words by chance."""
_NAME = (
    r"(?:[\w-]*[-_])?(?:api[-_]?keys?|access[-_]?keys?(?:[-_]id)?|secret[-_]?keys?|private[-_]?keys?|subscription[-_]?key"
    r"|key|token|pass(?:word|wd|phrase)?|secret|credentials?|authorization|auth|bearer|cookie|signature|sig)"
)
_OPTION = re.compile(rf"--?({_NAME})", re.IGNORECASE)
_ASSIGNED = re.compile(rf"""((?<![\w-])-{{0,2}}{_NAME}["']?\s*=\s*["']?)([^\s"'&;,}}]+)""", re.IGNORECASE)
_TOLD = re.compile(
    rf"""((?<![\w-])["']?{_NAME}["']?\s*:\s*["']?(?:(?:bearer|basic|token)\s+)?)([^\s"',;}}]+)""", re.IGNORECASE
)
_SCHEME = re.compile(r"((?<![\w-])bearer\s+)([\w.~+/=-]{6,})", re.IGNORECASE)
_USER = re.compile(r"(\w://)([^\s/@'\"]+)(?=@)")
_QUERY = re.compile(rf"([?&](?:{_NAME})=)([^\s&#'\"]+)", re.IGNORECASE)
_FORMS = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:sk|pk|rk|gsk|xai|nvapi|glpat|key)-(?=[\w-]*\d)[\w-]{6,}|sk-[\w-]{20,}"
    r"|(?:hf|ghp|gho|ghs|gsk|api_org)_(?=[A-Za-z]*\d)[A-Za-z0-9]{6,}|(?:hf|ghp|gho|ghs|gsk|api_org)_[A-Za-z0-9]{12,}"
    r"|github_pat_\w{10,}|AKIA[A-Z0-9]{12,}|AIza[\w-]{20,}|eyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)?"
    r")"
)
_PROSE, _GIVEN = (_USER, _QUERY, _SCHEME), (_ASSIGNED, _TOLD)
"""What is a secret in any text, and what only in the words of a command."""
Secret = str | SecretStr
"""What may be given for a secret; it is kept as a `SecretStr`, which shows itself as stars."""


def concealed(text: str, known: Iterable[Secret | None] = ()) -> str:
    """Give `text`, any prose, without the `known` secrets and without what has the form of one."""
    for value in sorted({_bare(one) for one in known if one is not None}, key=len, reverse=True):
        if len(value) >= _LEAST:
            text = text.replace(value, HIDDEN)
    return _without(text, _PROSE)


def redacted(arguments: Sequence[str]) -> list[str]:
    """Give the words of a command line without any secret in them."""
    known, words, hidden = list(secrets_of(arguments)), [], False
    for word in arguments:
        words.append(HIDDEN if hidden else _without(concealed(word, known), _GIVEN))
        hidden = _awaits(word)
    return words


def secrets_of(arguments: Sequence[str]) -> Iterator[str]:
    """Give the values in a command line that are secrets: those of options, variables, headers and addresses."""
    hidden = False
    for word in arguments:
        if hidden:
            yield word
        for pattern in (*_PROSE, *_GIVEN):
            for _, value in pattern.findall(word):
                yield value.rpartition(":")[2] if pattern is _USER else value
        hidden = _awaits(word)


def environment_secrets(arguments: Sequence[str]) -> list[str]:
    """Give the values of environment variables named like a secret, or named by an option ``--...-env`` as one."""
    pairs = itertools.pairwise(arguments)
    named = {value for option, value in pairs if option.endswith("-env")}
    named |= {word.partition("=")[2] for word in arguments if word.partition("=")[0].endswith("-env")}
    name = re.compile(_NAME, re.IGNORECASE)
    return [value for key, value in os.environ.items() if key in named or (name.fullmatch(key) and len(value) >= 8)]


def without_secrets(command: str) -> str:
    """Give a recorded command as it was typed, but for secrets; unchanged where there is none."""
    try:
        words = shlex.split(command)
    except ValueError:
        return concealed(command)
    found = redacted(words)
    return command if found == words else shlex.join(found)


Command = Annotated[str, AfterValidator(without_secrets)]
"""A recorded command: whoever records it, no manifest holds a secret of it."""


def _awaits(word: str) -> bool:
    """Whether the next word is the value of an option that is named like a secret."""
    return _OPTION.fullmatch(word) is not None


def _without(text: str, patterns: Iterable[re.Pattern[str]]) -> str:
    for pattern in patterns:
        text = pattern.sub(lambda found: found[1] + HIDDEN, text)
    return _FORMS.sub(HIDDEN, text)


def _bare(secret: Secret) -> str:
    return secret.get_secret_value() if isinstance(secret, SecretStr) else secret
