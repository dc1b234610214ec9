"""The bundled prompts are fit for use, and a user's own prompt file is read whole or refused with its place."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import calibration.prompts
from calibration.common.errors import CalibrationError
from calibration.prompts import DOMAINS, Prompt, load_prompts, read_prompt_file

BUNDLED = [prompt for file in load_prompts() for prompt in file.prompts]


def words(text: str) -> list[str]:
    return "".join(letter.lower() if letter.isalnum() else " " for letter in text).split()


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def refusal(path: Path) -> list[str]:
    """The lines of the error that reading `path` gives, without the folder."""
    with pytest.raises(CalibrationError) as caught:
        read_prompt_file(path)
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


# The bundled prompts


def test_at_least_sixty_prompts_spread_evenly_over_six_domains():
    counts = Counter(prompt.domain for prompt in BUNDLED)
    assert set(counts) == {"chat", "code", "mathematics", "science", "creative", "grounded"}
    assert sum(counts.values()) >= 60
    assert min(counts.values()) == max(counts.values()) >= 10


def test_files_come_in_the_fixed_order_and_are_named_after_their_domain():
    files = load_prompts()
    assert tuple(file.domain for file in files) == DOMAINS
    assert [file.name for file in files] == [f"{domain}.toml" for domain in DOMAINS]


def test_every_prompt_file_in_the_package_is_read():
    folder = Path(calibration.prompts.__file__).parent
    assert {path.name for path in folder.glob("*.toml")} == {file.name for file in load_prompts()}


def test_ids_are_unique_over_all_files_and_count_up_within_each():
    assert len({prompt.id for prompt in BUNDLED}) == len(BUNDLED)
    for file in load_prompts():
        numbers = range(1, len(file.prompts) + 1)
        assert [prompt.id for prompt in file.prompts] == [f"{file.domain}-{n:02d}" for n in numbers]
        assert {prompt.domain for prompt in file.prompts} == {file.domain}


def test_no_two_prompts_share_a_run_of_twelve_words():
    owner: dict[tuple[str, ...], str] = {}
    for prompt in BUNDLED:
        listed = words(prompt.text)
        for run in {tuple(listed[i : i + 12]) for i in range(max(1, len(listed) - 11))}:
            assert owner.setdefault(run, prompt.id) == prompt.id, " ".join(run)


def test_no_two_prompts_open_with_the_same_six_words():
    openings = Counter(tuple(words(prompt.text)[:6]) for prompt in BUNDLED)
    assert [opening for opening, count in openings.items() if count > 1] == []


def test_texts_are_short_enough_for_a_small_model_and_differ_in_length():
    lengths = [len(prompt.text) for prompt in BUNDLED]
    assert min(lengths) >= 40
    assert max(lengths) <= 1400
    assert max(lengths) > 10 * min(lengths)


def test_texts_have_no_stray_space_around_them_and_only_characters_that_show():
    for prompt in BUNDLED:
        assert prompt.text == prompt.text.strip()
        assert all(letter.isprintable() or letter == "\n" for letter in prompt.text), prompt.id
        assert prompt.kind


def test_grounded_prompts_carry_a_passage_after_their_instruction():
    (grounded,) = load_prompts(["grounded"])
    for prompt in grounded.prompts:
        instruction, _, passage = prompt.text.partition("\n\n")
        assert len(instruction.split()) <= 60, prompt.id
        assert 80 <= len(passage.split()) <= 250, prompt.id


def test_grounded_work_is_varied_and_translates_into_three_languages():
    (grounded,) = load_prompts(["grounded"])
    kinds = Counter(prompt.kind for prompt in grounded.prompts)
    assert {"summarise", "translate", "extract", "correct", "convert", "answer", "rewrite"} <= set(kinds)
    translations = [prompt.text for prompt in grounded.prompts if prompt.kind == "translate"]
    for language in ("French", "Spanish", "German"):
        assert sum(f"into {language}" in text for text in translations) == 1


def test_several_code_prompts_carry_code_and_it_is_fenced():
    (code,) = load_prompts(["code"])
    carrying = [prompt for prompt in code.prompts if "```" in prompt.text]
    assert len(carrying) >= 6
    assert all(prompt.text.count("```") % 2 == 0 for prompt in carrying)


def test_python_in_the_prompts_compiles():
    (code,) = load_prompts(["code"])
    blocks = [block.partition("\n```")[0] for p in code.prompts for block in p.text.split("```python\n")[1:]]
    assert len(blocks) >= 4
    for block in blocks:
        compile(block, "prompt", "exec")


# Choosing among them


def test_limit_keeps_the_first_prompts_of_each_domain():
    whole, few = load_prompts(), load_prompts(limit_per_domain=2)
    assert [len(file.prompts) for file in few] == [2] * 6
    assert [file.prompts for file in few] == [file.prompts[:2] for file in whole]


def test_a_limit_beyond_the_file_keeps_all():
    assert load_prompts(limit_per_domain=1000) == load_prompts()


@pytest.mark.parametrize("limit", [0, -3])
def test_a_limit_below_one_is_refused(limit):
    with pytest.raises(CalibrationError, match=f"limit_per_domain: must be at least 1, got {limit}"):
        load_prompts(limit_per_domain=limit)


def test_chosen_domains_come_in_the_fixed_order_once_each():
    files = load_prompts(["grounded", "chat", "grounded"])
    assert [file.domain for file in files] == ["chat", "grounded"]


def test_an_unknown_domain_is_refused_with_the_nearest_name():
    with pytest.raises(CalibrationError) as caught:
        load_prompts(["code", "maths"])
    assert str(caught.value) == (
        "bundled prompts: domains: must be a known domain, got 'maths'; did you mean 'mathematics'?"
    )


def test_an_empty_choice_of_domains_is_refused():
    with pytest.raises(CalibrationError, match="domains: must name at least one, got none; choose from chat"):
        load_prompts([])


# Hashes and values


def test_the_hash_is_that_of_the_bytes_on_disk_whatever_part_is_used():
    folder = Path(calibration.prompts.__file__).parent
    for file in load_prompts(limit_per_domain=1):
        assert file.sha256 == hashlib.sha256((folder / file.name).read_bytes()).hexdigest()
    assert [f.sha256 for f in load_prompts(limit_per_domain=1)] == [f.sha256 for f in load_prompts()]
    assert len({file.sha256 for file in load_prompts()}) == len(DOMAINS)


def test_the_hash_of_known_bytes_is_the_known_hash(tmp_path):
    path = write(tmp_path, "own.jsonl", '{"id": "a", "domain": "chat", "text": "Hello"}\n')
    (file,) = read_prompt_file(path)
    # printf '%s\n' '{"id": "a", "domain": "chat", "text": "Hello"}' | sha256sum
    assert file.sha256 == "22910c5c57f5d10c453bdcd60bf34cb51397b4a756d3cf22cc9276fbf1d19b10"


def test_one_changed_byte_changes_the_hash(tmp_path):
    line = '{"id": "a", "domain": "chat", "text": "Hello"}'
    one = read_prompt_file(write(tmp_path, "one.jsonl", line))
    two = read_prompt_file(write(tmp_path, "two.jsonl", line + "\n"))
    assert one[0].prompts == two[0].prompts
    assert one[0].sha256 != two[0].sha256


def test_prompts_and_files_cannot_be_changed():
    (file,) = load_prompts(["chat"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        file.prompts[0].text = "other"  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        file.domain = "code"  # type: ignore[misc]


def test_torch_is_not_imported():
    code = "import sys, calibration.prompts as p; p.load_prompts(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# A user's own file

OWN_TOML = """\
domain = "law"

[[prompt]]
id = "first"
kind = "explain"
text = '''

What is a contract?
'''

[[prompt]]
id = "second"
text = "Summarise: ..."
"""


def test_own_toml_is_read_with_its_own_domain(tmp_path):
    (file,) = read_prompt_file(write(tmp_path, "own.toml", OWN_TOML))
    assert (file.name, file.domain) == ("own.toml", "law")
    assert file.prompts == (
        Prompt("first", "law", "What is a contract?", "explain"),
        Prompt("second", "law", "Summarise: ..."),
    )


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
def test_line_ends_of_windows_give_the_same_prompts(tmp_path, start):
    content = start + OWN_TOML.replace("\n", "\r\n").encode()
    unix = read_prompt_file(write(tmp_path, "unix.toml", OWN_TOML))
    windows = read_prompt_file(write(tmp_path, "windows.toml", content))
    assert windows[0].prompts == unix[0].prompts


def test_own_jsonl_gives_one_file_per_domain_in_order_of_appearance(tmp_path):
    lines = [
        '{"id": "b", "domain": "science", "text": "Why?"}',
        "",
        '{"id": "a", "domain": "chat", "text": "  indented\\n", "kind": "odd"}',
        '{"id": "c", "domain": "science", "text": "How?"}',
    ]
    files = read_prompt_file(write(tmp_path, "own.jsonl", "\r\n".join(lines)))
    assert [(file.domain, [prompt.id for prompt in file.prompts]) for file in files] == [
        ("science", ["b", "c"]),
        ("chat", ["a"]),
    ]
    assert files[1].prompts[0] == Prompt("a", "chat", "  indented", "odd")
    assert len({file.sha256 for file in files}) == 1
    assert {file.name for file in files} == {"own.jsonl"}


def test_own_file_can_be_read_in_part(tmp_path):
    lines = [f'{{"id": "{d}{n}", "domain": "{d}", "text": "?"}}' for n in range(3) for d in ("law", "chat")]
    path = write(tmp_path, "own.jsonl", "\n".join(lines))
    (file,) = read_prompt_file(path, domains=["law"], limit_per_domain=2)
    assert [prompt.id for prompt in file.prompts] == ["law0", "law1"]
    with pytest.raises(CalibrationError, match=r"own\.jsonl: domains: .* got 'lav'; did you mean 'law'\?"):
        read_prompt_file(path, domains=["lav"])


printable = st.text(min_size=1).filter(lambda text: text.strip() == text and "\r" not in text)


@given(
    st.lists(st.tuples(printable, st.sampled_from(DOMAINS), printable), min_size=1, unique_by=lambda row: row[0]),
    st.booleans(),
)
def test_any_text_survives_a_jsonl_file(tmp_path_factory, rows, ascii_only):
    path = tmp_path_factory.mktemp("jsonl") / "any.jsonl"
    lines = [
        json.dumps({"id": i, "domain": domain, "text": text}, ensure_ascii=ascii_only) for i, domain, text in rows
    ]
    path.write_bytes("\n".join(lines).encode())
    read = [prompt for file in read_prompt_file(path) for prompt in file.prompts]
    assert sorted((p.id, p.domain, p.text) for p in read) == sorted(rows)
    order = {domain: [row[0] for row in rows if row[1] == domain] for domain in DOMAINS}
    assert all([p.id for p in f.prompts] == order[f.domain] for f in read_prompt_file(path))


# Refusals of a file as a whole


def test_a_missing_file_is_refused(tmp_path):
    (line,) = refusal(tmp_path / "none.toml")
    assert line == "none.toml: a prompt file must be readable, got 'No such file or directory'"


@pytest.mark.parametrize(("name", "got"), [("own.json", ".json"), ("own", ""), ("own.TXT", ".TXT")])
def test_another_ending_is_refused(tmp_path, name, got):
    (line,) = refusal(write(tmp_path, name, "{}"))
    assert line == f"{name}: a prompt file must end in .toml or .jsonl, got '{got}'"


@pytest.mark.parametrize("name", ["own.toml", "own.jsonl"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path, name, start):
    (line,) = refusal(write(tmp_path, name, start + b"# one\n# two\n\xff"))
    assert line == f"{name}:3: must be UTF-8, got byte 0xff"


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('domain = "chat"\n[[prompt]\n', 2),
        ('domain = "chat"\n\n\nid = \n', 4),
        ("domain = \"chat\"\n[[prompt]]\ntext = '''\nnever closed", 4),
        ('domain = "chat"\ndomain = "code"\n', 2),
    ],
    ids=["bracket", "value", "unterminated", "twice"],
)
def test_malformed_toml_is_refused_with_its_line(tmp_path, content, line):
    (message,) = refusal(write(tmp_path, "own.toml", content))
    assert message.startswith(f"own.toml:{line}: must be valid TOML, got '")
    assert "at line" not in message


def test_malformed_json_is_refused_with_line_and_column(tmp_path):
    good = '{"id": "a", "domain": "chat", "text": "Hello"}'
    (line,) = refusal(write(tmp_path, "own.jsonl", f'{good}\n\n{{"id": b}}\n'))
    assert line == "own.jsonl:3: must be a JSON object on one line, got 'Expecting value' at column 8"


@pytest.mark.parametrize(
    ("name", "content"), [("own.toml", 'domain = "chat"\nprompt = []\n'), ("own.jsonl", "\n\n"), ("own.jsonl", "")]
)
def test_a_file_without_prompts_is_refused(tmp_path, name, content):
    assert refusal(write(tmp_path, name, content)) == [f"{name}: must hold at least one prompt, got none"]


def test_all_faults_at_the_top_of_a_toml_file_are_named(tmp_path):
    lines = refusal(write(tmp_path, "own.toml", 'domains = "chat"\nauthor = "me"\n[prompt]\nid = "a"\n'))
    assert lines == [
        "own.toml: domains: unknown key; did you mean 'domain'?",
        "own.toml: author: unknown key; choose from domain, prompt",
        "own.toml: domain: required, missing",
        "own.toml: prompt: must be tables headed [[prompt]], got a dict",
    ]


def test_an_empty_toml_file_is_refused(tmp_path):
    assert refusal(write(tmp_path, "own.toml", "")) == [
        "own.toml: domain: required, missing",
        "own.toml: prompt: required, missing",
    ]


@pytest.mark.parametrize("value", ['"Chat"', '""', '"two words"', "3", '["chat"]'])
def test_a_domain_that_is_no_name_is_refused(tmp_path, value):
    got = {"3": "3", '["chat"]': "a list"}.get(value, repr(json.loads(value)))
    rule = f"domain: must be a name in small letters, digits, - and _, got {got}"
    toml = f'domain = {value}\n[[prompt]]\nid = "a"\ntext = "b"\n'
    assert refusal(write(tmp_path, "own.toml", toml)) == [f"own.toml: {rule}"]
    line = f'{{"id": "a", "domain": {value}, "text": "b"}}'
    assert refusal(write(tmp_path, "own.jsonl", line)) == [f"own.jsonl:1: {rule}"]


# Refusals of one entry: (keys and values of the entry, what follows its place in the error)

ENTRY_FAULTS = {
    "no id": ({"text": "b"}, "id: required, missing"),
    "no text": ({"id": "a"}, "text: required, missing"),
    "empty text": ({"id": "a", "text": ""}, "text: must not be empty, got ''"),
    "blank text": ({"id": "a", "text": " \n "}, "text: must not be empty, got ' \\n '"),
    "blank id": ({"id": " ", "text": "b"}, "id: must not be empty, got ' '"),
    "number as id": ({"id": 7, "text": "b"}, "id: must be a string, got 7"),
    "list as text": ({"id": "a", "text": ["b"]}, "text: must be a string, got a list"),
    "flag as kind": ({"id": "a", "text": "b", "kind": True}, "kind: must be a string, got True"),
    "misspelt key": ({"id": "a", "text": "b", "kinds": "c"}, "kinds: unknown key; did you mean 'kind'?"),
    "strange key": (
        {"id": "a", "text": "b", "x": 1},
        "x: unknown key; choose from domain, id, kind, text",
    ),
}


@pytest.mark.parametrize(("entry", "rule"), ENTRY_FAULTS.values(), ids=ENTRY_FAULTS.keys())
def test_a_faulty_entry_is_refused_with_its_place(tmp_path, entry, rule):
    good = {"id": "good", "text": "fine"}
    lines = [json.dumps({"domain": "chat", **fields}) for fields in (good, entry)]
    assert refusal(write(tmp_path, "own.jsonl", "\n".join(lines))) == [f"own.jsonl:2: {rule}"]

    tables = ["[[prompt]]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in e.items()) for e in (good, entry)]
    name = f" ({entry['id']})" if isinstance(entry.get("id"), str) else ""
    toml = 'domain = "chat"\n' + "\n".join(tables)
    assert refusal(write(tmp_path, "own.toml", toml)) == [f"own.toml: prompt 2{name}: {rule}"]


def test_jsonl_entry_without_a_domain_is_refused(tmp_path):
    path = write(tmp_path, "own.jsonl", '{"id": "a", "text": "b"}')
    assert refusal(path) == ["own.jsonl:1: domain: required, missing"]


def test_toml_entry_with_a_domain_of_its_own_is_refused(tmp_path):
    toml = 'domain = "chat"\n[[prompt]]\nid = "a"\ntext = "b"\ndomain = "code"\n'
    assert refusal(write(tmp_path, "own.toml", toml)) == [
        "own.toml: prompt 1: domain: must stand at the top of a TOML file, got it here"
    ]


@pytest.mark.parametrize(("entry", "got"), [("[1, 2]", "a list"), ('"text"', "'text'"), ("null", "None")])
def test_an_entry_that_is_no_object_is_refused(tmp_path, entry, got):
    rule = f"must be an object with id, domain and text, got {got}"
    assert refusal(write(tmp_path, "own.jsonl", entry)) == [f"own.jsonl:1: {rule}"]


def test_a_toml_list_of_strings_is_refused(tmp_path):
    (line,) = refusal(write(tmp_path, "own.toml", 'domain = "chat"\nprompt = ["Hello"]\n'))
    assert line == "own.toml: prompt 1: must be an object with id, domain and text, got 'Hello'"


def test_half_of_a_surrogate_pair_is_refused(tmp_path):
    path = write(tmp_path, "own.jsonl", '{"id": "a", "domain": "chat", "text": "\\ud83d"}')
    assert refusal(path) == ["own.jsonl:1: text: must be Unicode text, got half of a surrogate pair"]


def test_a_repeated_id_is_refused_with_both_places(tmp_path):
    lines = [f'{{"id": "a", "domain": "{domain}", "text": "b"}}' for domain in ("chat", "code")]
    (line,) = refusal(write(tmp_path, "own.jsonl", "\n".join(lines)))
    assert line == "own.jsonl:2: id: must be unique, got 'a' (first at own.jsonl:1)"
    (line,) = refusal(write(tmp_path, "own.toml", OWN_TOML.replace("second", "first")))
    assert line == "own.toml: prompt 2 (first): id: must be unique, got 'first' (first at own.toml: prompt 1 (first))"


def test_faults_of_all_entries_are_named_at_once(tmp_path):
    lines = ['{"id": "a", "txt": "b", "domain": "chat"}', "[]", '{"id": "", "domain": "chat", "text": "c"}']
    assert refusal(write(tmp_path, "own.jsonl", "\n".join(lines))) == [
        "own.jsonl:1: txt: unknown key; did you mean 'text'?",
        "own.jsonl:1: text: required, missing",
        "own.jsonl:2: must be an object with id, domain and text, got a list",
        "own.jsonl:3: id: must not be empty, got ''",
    ]
