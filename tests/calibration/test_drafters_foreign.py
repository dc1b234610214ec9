"""Drafters in another vocabulary: the vocabularies, the translation of a draft, and replay against the live loop."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from distilled import tiny_corpus
from hypothesis import given
from hypothesis import strategies as st
from replayed import GREEDY, SAMPLED, live, recorded, rows_of, same_rounds, walk
from scipy import stats
from tiny import tiny_llama, tiny_tokenizer
from tokens import LINES, byte_tokenizer, mark_tokenizer, tokens_verifier

from calibration.common.errors import CalibrationError
from calibration.common.vocabularies import Correspondence, Vocabulary, readable
from calibration.drafters.foreign import Foreign
from calibration.drafters.foreign_drafting import ForeignDrafter, NgramTranslation, TextTranslation
from calibration.models.lane import generate
from calibration.models.load import make_verifier
from calibration.models.sampling import distribution, generator_for
from calibration.traces.manifest import DrafterInfo
from calibration.training.foreign import Budget, LlamaShape, train_standalone, train_tokenizer

CPU = torch.device("cpu")
TEXTS = st.text(st.sampled_from("abc hel\n\t ,.'äß日🙂1_"), max_size=24)


@pytest.fixture(scope="module")
def small():
    return Vocabulary("small", byte_tokenizer(300))


@pytest.fixture(scope="module")
def large():
    return Vocabulary("large", byte_tokenizer(420, ("<start>", "<end>")))


@pytest.fixture(scope="module")
def marks():
    return Vocabulary("marks", mark_tokenizer())


# What tokens say in bytes.


@given(text=TEXTS)
def test_the_bytes_of_tokens_are_those_of_the_text(small, large, marks, text):
    for vocabulary in (small, large):
        assert b"".join(vocabulary.pieces[i] for i in vocabulary.encode(text)) == text.encode()
    found = b"".join(marks.pieces[i] for i in marks.encode(text))
    # NOTE: such tokenizers put a blank in front, but for texts that begin with one.
    assert found.removeprefix(b" ").removeprefix(b" ") == text.encode().removeprefix(b" ").removeprefix(b" ")


@given(before=TEXTS, text=TEXTS)
def test_a_draft_is_spelled_exactly_behind_any_text(small, large, before, text):
    for vocabulary in (small, large):
        tokens = vocabulary.encode_after(before, text)
        assert tokens is not None
        assert b"".join(vocabulary.pieces[i] for i in tokens) == text.encode()


def test_a_draft_is_read_in_the_context_of_the_committed_text(large, marks):
    the = large.encode(" the ferry")
    assert large.encode_after("The mouth of", " the ferry") == the
    inside = marks.encode_after("people on the fer", "ry and")
    assert b"".join(marks.pieces[i] for i in inside) == b"ry and"  # no blank in front
    word = max((p.decode() for p in large.pieces if p and p.isalpha()), key=len)
    assert len(word) > 3
    assert len(large.encode(word)) == 1
    assert large.encode_after(word[:2], word[2:]) == large.encode(word[2:])  # the committed token stays as it is


def test_text_that_reads_like_a_special_token_is_not_drafted(large):
    assert large.encode_after("", "so <end> it") is None


def test_words_end_inside_no_character():
    assert readable("süß".encode()[:2]) == ("s", False)
    assert readable("süß".encode()) == ("süß", True)
    assert readable(b"a\xffb") == ("a\ufffdb", True)
    assert readable("a🙂".encode()[:-1]) == ("a", False)


def test_slow_and_strange_tokenizers_are_refused():
    with pytest.raises(CalibrationError, match="fast tokenizer"):
        Vocabulary("slow", object())
    tokenizer = tiny_tokenizer()
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    told["decoder"] = {"type": "CTC", "pad_token": "x", "word_delimiter_token": "|", "cleanup": True}
    strange = type("Strange", (), {"backend_tokenizer": type("B", (), {"to_str": lambda self: json.dumps(told)})()})
    with pytest.raises(CalibrationError, match="decodes by CTC"):
        Vocabulary("strange", strange())


# Which tokens correspond.


def test_special_tokens_correspond_by_name_then_by_role(small, large, marks):
    assert Correspondence.between(large, small).specials == {large.specials["<end>"]: small.specials["<end>"]}
    words = Correspondence.between(large, marks)
    assert words.specials == {large.roles["eos"]: marks.roles["eos"]}
    start, end = large.specials["<start>"], large.specials["<end>"]
    ids = [start, *large.encode("the"), end, *large.encode("ferry")]
    assert words.to_drafter(ids) == (*marks.encode("the"), marks.roles["eos"], *marks.encode("ferry"))


def test_direct_tokens_say_the_same(small, large):
    words = Correspondence.between(large, small)
    assert len(words.direct) > 256
    assert all(small.pieces[its] == large.pieces[mine] for its, mine in words.direct.items())


def test_a_text_that_ends_inside_a_character_is_not_read(small, large):
    words = Correspondence.between(small, large)
    half = [i for i, piece in enumerate(small.pieces) if piece == "日".encode()[:1]]
    assert words.to_drafter([*small.encode("the"), *half]) is None


@given(text=TEXTS)
def test_ngrams_are_the_pieces_of_drafter_tokens_that_spell_a_verifier_token(small, large, text):
    """The reference joins every slice of drafter tokens and looks where it begins."""
    ids, its = large.encode(text), small.encode(text)
    begins = np.cumsum([0, *(len(small.pieces[i]) for i in its)]).tolist()
    wanted, at = {}, 0
    for token in ids:
        size = len(large.pieces[token])
        if at in begins and at + size in begins:
            key = its[begins.index(at) : begins.index(at + size)]
            if len(key) > 1:
                wanted[key] = token
        at += size
    assert Correspondence.between(large, small).ngrams(ids) == wanted


def test_a_blank_put_in_front_spoils_no_ngram(large, marks):
    words = Correspondence.between(large, marks)
    found = words.ngrams(large.encode(LINES[1]))
    assert found
    for key, token in found.items():
        assert b"".join(marks.pieces[i] for i in key) == large.pieces[token]


# A draft that grows.


def translated(make, tokens, count):
    translation = make()
    for token in tokens[:count]:
        if translation.done:
            break
        translation.push(token)
    return translation


@given(tokens=st.lists(st.integers(0, 299), max_size=20), before=TEXTS)
def test_what_is_settled_stays_as_the_draft_grows(small, large, tokens, before):
    words = Correspondence.between(large, small)
    ngrams = words.ngrams(large.encode("".join(LINES)))
    for make in (lambda: TextTranslation(words, before), lambda: NgramTranslation(words, ngrams)):
        whole = translated(make, tokens, len(tokens))
        whole.finish()
        final = whole.settled
        assert final.passes == sorted(final.passes)
        assert all(n <= p <= len(tokens) for n, p in zip(final.needed, final.passes, strict=True))
        for count in range(len(tokens)):
            early = translated(make, tokens, count).settled.tokens
            assert final.tokens[: len(early)] == early
        drafted = b"".join(small.pieces[i] or b"" for i in tokens)
        said = b"".join(large.pieces[i] or b"" for i in final.tokens)
        assert drafted.startswith(said)


def test_words_are_settled_when_the_next_one_begins(small, large):
    words = Correspondence.between(large, small)
    tokens = [i for word in ("the", " fer", "ry", " ri") for i in small.encode(word)]
    translation = TextTranslation(words, "on ")
    seen = []
    for token in tokens:
        translation.push(token)
        seen.append(b"".join(large.pieces[i] for i in translation.settled.tokens).decode())
    assert set(seen) == {"", "the", "the ferry"}
    translation.finish()
    assert b"".join(large.pieces[i] for i in translation.settled.tokens) == b"the ferry ri"


def test_a_special_token_ends_the_draft_and_is_proposed(small, large):
    words = Correspondence.between(large, small)
    for translation in (TextTranslation(words, ""), NgramTranslation(words, {})):
        for token in (*small.encode("ab"), small.specials["<end>"]):
            translation.push(token)
        assert translation.done
        assert translation.settled.tokens[-1] == large.specials["<end>"]
        assert b"".join(large.pieces[i] for i in translation.settled.tokens[:-1]) == b"ab"


def test_half_a_character_is_not_proposed(small, large):
    words = Correspondence.between(large, small)
    byte = {piece: i for i, piece in enumerate(small.pieces) if piece and len(piece) == 1}
    translation = TextTranslation(words, "")
    for value in b"a" + "日".encode()[:2]:
        translation.push(byte[bytes([value])])
    translation.push(small.specials["<end>"])  # nor is what would follow it
    assert b"".join(large.pieces[i] for i in translation.settled.tokens) == b"a"


def test_the_longest_known_ngram_is_taken_and_unknown_tokens_end_the_draft(small, large):
    words = Correspondence.between(large, small)
    a, b, c, missing = (small.encode(letter)[0] for letter in "abcd")
    words = dataclasses.replace(words, direct={i: its for i, its in words.direct.items() if i != missing})
    ngrams = {(a, b): 7, (a, b, c): 8, (b, c): 9}
    translation = NgramTranslation(words, ngrams)
    for token in (a, b):
        translation.push(token)
        assert translation.settled.tokens == []  # a longer one may come
    translation.push(c)
    assert (translation.settled.tokens, translation.settled.needed) == ([8], [3])
    for token in (a, b, a):
        translation.push(token)
    assert translation.settled.tokens == [8, 7]
    translation.push(missing)
    assert translation.settled.tokens == [8, 7, words.direct[a]]
    assert translation.done


# The drafter, on models that know a little text by heart.

SHAPE = LlamaShape(hidden=48, layers=2, heads=2, kv_heads=1, intermediate=96, context=256)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("trained")
    for name, vocabulary, steps in (("verifier", 400, 80), ("drafter", 300, 60)):
        budget = Budget(steps=steps, batch=8, tokens=40, learning_rate=1e-2, warmup=5, autocast=False)
        special = ("<start>", "<end>") if name == "verifier" else ("<end>",)
        train_standalone(
            LINES * 4,
            root / name,
            vocabulary=vocabulary,
            shape=SHAPE,
            budget=budget,
            special_tokens=special,
            device="cpu",
        )
    return root


@pytest.fixture(scope="module")
def trained(folders):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folders / "verifier", dtype=torch.float64)
    return make_verifier("trained", model.eval(), AutoTokenizer.from_pretrained(folders / "verifier"))


@pytest.fixture(scope="module", params=["text", "ngrams"])
def drafter(request, folders, trained):
    return Foreign(model=str(folders / "drafter"), through=request.param, max_draft_tokens=10).build(trained)


@pytest.fixture(scope="module")
def prompts(trained):
    tokenizer = trained.tokenizer
    return [tokenizer(line).input_ids[:size] for line, size in zip(LINES, (6, 9, 4), strict=False)]


@pytest.fixture(scope="module")
def outputs(trained, prompts):
    return generate(trained.model, prompts, GREEDY, 26, trained.end_ids, generator_for(CPU, 0))


def naive(drafter, committed, wanted):
    """One start by itself: whole passes without a cache, one drafted token after the other."""
    start = drafter.begin(committed)
    if start is None:
        return [], [], []
    ids, passes, sure = list(start.ids), 0, []
    while not start.translation.done and len(start.translation.settled.tokens) < wanted:
        q = torch.softmax(drafter.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1], -1)
        ids.append(int(q.argmax()))
        sure.append(float(q.max()))
        passes += 1
        start.translation.push(ids[-1])
        if passes == drafter.limit:
            start.translation.finish()
    settled = start.translation.settled
    products, begin = [], 0
    for end in settled.needed[:wanted]:
        products.append(float(np.prod(sure[begin:end])))
        begin = max(begin, end)
    return settled.tokens[:wanted], settled.passes[:wanted], products


def test_drafts_from_all_starts_are_those_of_one_start_at_a_time(trained, drafter, prompts, outputs):
    recording = recorded(trained, [drafter], prompts, outputs, GREEDY, stride=3)
    proposed = 0
    for row, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        rows = rows_of(recording.positions, f"r{row}", drafter.name)
        steps = rows_of(recording.rollouts, f"r{row}", drafter.name)
        for t in range(len(output.ids)):
            tokens, passes, sure = naive(drafter, [*prompt, *output.ids[:t]], drafter.limit)
            agreed = next((i for i, x in enumerate(tokens) if x != (*output.ids, -1, *[-1] * 20)[t + i]), len(tokens))
            assert rows["run_length"][t] == agreed
            assert rows["proposal_length"][t] == len(tokens)
            assert rows["draft_layers"][t] == [2 * count for count in passes]
            if t % 3 == 0:
                mine = [c for p, c in zip(steps["position"], steps["drafter_confidence"], strict=True) if p == t]
                assert mine == pytest.approx(sure, abs=1e-5)
            proposed += len(tokens)
    assert proposed > 200
    assert max(recording.positions["run_length"]) >= 3


@pytest.mark.parametrize("gamma", [1, 2, 4, 8])
def test_live_rounds_are_those_of_the_replay(trained, drafter, prompts, outputs, gamma):
    recording = recorded(trained, [drafter], prompts, outputs, GREEDY)
    accepted = 0
    for row, run in enumerate(live(trained, drafter, prompts, gamma, GREEDY, 26, trained.end_ids)):
        assert run.ids == outputs[row].ids
        assert run.rounds == walk(rows_of(recording.positions, f"r{row}", drafter.name), gamma)
        accepted += sum(r.accepted for r in run.rounds)
    assert accepted > 5


@pytest.mark.parametrize("through", ["text", "ngrams"])
def test_texts_of_random_bytes_replay_as_well(through):
    """Random models write broken characters and special tokens, and seldom agree; nothing may depend on that."""
    verifier = tokens_verifier(3, 300, ("<start>", "<end>"))
    tokenizer = byte_tokenizer(330)
    words = Correspondence.between(Vocabulary("v", verifier.tokenizer), Vocabulary("d", tokenizer))
    info = DrafterInfo(name="random", paradigm="foreign", deterministic=True, max_draft_tokens=6, layers=4)
    drafter = ForeignDrafter(info, tiny_llama(5, vocabulary=len(tokenizer)), words, through, {})
    same_rounds(verifier, drafter, tokens=16, rows=4, gammas=(1, 3))


# Sampled decoding, in a vocabulary so small that every text can be listed.

ROWS, HORIZON = 700, 3


def plain_tokenizer(words, merges):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges))
    return PreTrainedTokenizerFast(tokenizer_object=bpe)


def test_sampled_text_is_the_verifiers_own_and_proposals_are_accepted_with_p():
    mine = plain_tokenizer(["a", "b", "c", "ab", "ca"], [("a", "b"), ("c", "a")])
    verifier = make_verifier("letters", tiny_llama(5, vocabulary=5, spread=0.35), mine)
    words = Correspondence.between(Vocabulary("v", mine), Vocabulary("d", plain_tokenizer(["c", "b", "a"], [])))
    info = DrafterInfo(name="letters", paradigm="foreign", deterministic=True, max_draft_tokens=4, layers=4)
    drafter = ForeignDrafter(info, tiny_llama(6, vocabulary=3), words, "ngrams", {(2, 1): 3, (0, 2): 4})
    prompt = [0, 1, 2, 3, 4]
    runs = live(verifier, drafter, [prompt] * ROWS, 2, SAMPLED, HORIZON, frozenset())
    seen = np.zeros((5,) * HORIZON)
    for run in runs:
        seen[run.ids] += 1
    exact = np.ones((5,) * HORIZON)
    for text in np.ndindex(exact.shape):
        logits = verifier.model(input_ids=torch.tensor([[*prompt, *text]]), use_cache=False).logits[0]
        p = distribution(logits[len(prompt) - 1 : -1], SAMPLED.temperature, SAMPLED.top_p)
        exact[text] = np.prod([float(p[i, token]) for i, token in enumerate(text)])
    big = exact * ROWS >= 8
    observed = [*seen[big], ROWS - seen[big].sum()]
    expected = [*(exact[big] * ROWS), ROWS * (1 - exact[big].sum())]
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    # Acceptance of the first draft behind x_0: p of what is proposed there.
    recording = recorded(verifier, [drafter], [prompt] * 40, runs[:40], SAMPLED)
    for row in range(40):
        rows = rows_of(recording.positions, f"r{row}", "letters")
        for t in range(HORIZON):
            tokens, _, _ = naive(drafter, [*prompt, *runs[row].ids[:t]], 4)
            assert bool(rows["accept_probability"][t]) == (tokens[0] == runs[row].ids[t])
            assert rows["overlap"][t] is not None
    accepted = np.array([run.rounds[0].accepted > 0 for run in runs])
    chance = np.zeros(ROWS)
    mass = {}
    for row, run in enumerate(runs):
        if run.ids[0] not in mass:
            proposed = naive(drafter, [*prompt, run.ids[0]], 1)[0][0]
            logits = verifier.model(input_ids=torch.tensor([[*prompt, run.ids[0]]])).logits[0, -1]
            mass[run.ids[0]] = float(distribution(logits, SAMPLED.temperature, SAMPLED.top_p)[proposed])
        chance[row] = mass[run.ids[0]]
    assert abs((accepted - chance).sum()) < 3.5 * np.sqrt((chance * (1 - chance)).sum())
    assert 0.02 < chance.mean() < 0.98


# Training and settings.


def test_training_lowers_the_loss_and_says_how_it_was_done(folders):
    recipe = json.loads((folders / "drafter" / "recipe.json").read_text())
    assert recipe["loss_nats"][0] > np.log(300) - 1.5
    assert recipe["loss_nats"][-1] < 0.5 * recipe["loss_nats"][0]
    assert recipe["budget"]["steps"] == 60


def test_training_repeats_with_its_seed(tmp_path):
    budget = Budget(steps=3, batch=2, tokens=8, autocast=False)
    made = [
        train_standalone(LINES, tmp_path / name, vocabulary=280, shape=SHAPE, budget=budget, seed=seed, device="cpu")
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    same, again, other = ((path / "model.safetensors").read_bytes() for path in made)
    assert same == again != other


def test_training_needs_text_and_room_for_every_byte(tmp_path):
    with pytest.raises(CalibrationError, match="more than 128 tokens, got"):
        train_standalone(["short"], tmp_path / "x", vocabulary=300, device="cpu")
    with pytest.raises(CalibrationError, match="256 bytes"):
        train_tokenizer(LINES, 256, ("<end>",))


def test_settings_say_what_was_loaded(drafter, folders):
    assert drafter.info.deterministic
    assert drafter.info.max_draft_tokens == 10
    assert (drafter.info.vocabulary, drafter.info.layers) == (300, 2)
    assert drafter.info.settings["shared_tokens"] > 256
    assert Foreign(model=str(folders / "drafter")).label == "drafter"


def test_ngrams_of_a_corpus_are_known_from_the_beginning(folders, trained, tmp_path):
    texts = tiny_corpus(trained, tmp_path / "corpus", count=8)
    told = {"model": str(folders / "drafter"), "through": "ngrams"}
    made = Foreign(**told, corpus_path=str(tmp_path / "corpus")).build(trained)
    assert made.known == {k: t for text in texts for k, t in made.words.ngrams(text.output_ids).items()} != {}
    assert made.info.settings["ngrams"] == len(made.known)
    with pytest.raises(CalibrationError, match="must be a TraceSet or a corpus"):
        Foreign(**told, corpus_path=str(tmp_path)).build(trained)


def test_a_model_that_is_not_there_is_refused(trained, tmp_path):
    with pytest.raises(CalibrationError, match="drafter 'nothing': model must be"):
        Foreign(model=str(tmp_path / "nothing")).build(trained)


def test_a_step_is_one_pass_over_one_of_its_own_tokens(drafter):
    assert drafter.step(2, 16, torch.Generator())() > 0
