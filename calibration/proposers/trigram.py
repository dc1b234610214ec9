"""Tri-gram drafting with search: a draft tree grown by PUCT over a tri-gram model that learns online.

The model. C counts tri-grams and bi-grams, first of a corpus, then of the request itself, whose tokens weigh
`online_weight` each. With M2(x | b) = C(b, x) / C(b), the matrix is

    M(x | a, b) = (C(a, b, x) + s M2(x | b)) / (C(a, b) + s),

which backs off to bi-grams with the weight of s counts, and is M2 where (a, b) was never seen. Where b was never seen
nothing is proposed. Per context the `branching` tokens of largest count are kept at hand (exactly; of equal counts
the one counted last stands first), and the candidates after (a, b) are those of both contexts, by M, cut at
`branching`.

The search, in our reading. A node is a drafted token, its prior M given the two tokens before it. A simulation starts
at the committed text and goes down to the child of largest

    Q + c M sqrt(N) / (1 + n),

N visits of the node, n of the child, until it meets a child that was never visited, which joins the tree, or a node
without candidates or of full depth D. The value of a simulation for a node it passed is the expected number of
accepted tokens from that node on along the simulated path, sum over j of the product of M from the node to j, divided
by D; Q is the mean over the simulations that passed, and 0 before the first. The draft is the set of visited nodes.
Nothing is random: ties go to the candidate that stands first.

Source: Liu and others, "Adaptive Draft-Verification for Efficient Large Language Model Decoding" (ADED, 2024), for
the tri-gram representation with online updates and the search with a PUCT score. The back-off, Q and the simulations
are our reading.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import sqrt

from calibration.proposers.draft_trees import breadth_first, cut
from calibration.proposers.protocol import Draft, refuse, whole, within


@dataclass(frozen=True)
class TrigramSettings:
    """What a tri-gram proposer drafts; see the module for the letters.

    `nodes`: budget of the tree. `simulations`: at most so many searches, of which those that end at a node without
    children add none. `exploration`: c. `back_off`: s. `online_weight`: counts that one committed token adds.
    """

    nodes: int = 24
    simulations: int = 48
    max_draft_tokens: int = 8
    branching: int = 8
    exploration: float = 1.0
    back_off: float = 1.0
    online_weight: int = 8

    def __post_init__(self) -> None:
        """Refuse settings that cannot be, all faults in one `CalibrationError`."""
        sizes = ("nodes", "simulations", "max_draft_tokens", "branching", "online_weight")
        refuse(
            "tri-gram",
            *(whole(name, getattr(self, name)) for name in sizes),
            within("exploration", self.exploration, 0, 1000),
            within("back_off", self.back_off, 0, 1e6, open_low=True),
        )


class _Context:
    """Counts of what follows one context: `counts` by token, their `total`, and the `best` tokens in order."""

    __slots__ = ("best", "counts", "total")

    def __init__(self, other: _Context | None = None) -> None:
        self.counts: dict[int, int] = dict(other.counts) if other else {}
        self.total: int = other.total if other else 0
        self.best: list[int] = list(other.best) if other else []

    def add(self, token: int, weight: int, keep: int) -> None:
        """Count `token`; only it can rise, so the `keep` best stay exact."""
        count = self.counts[token] = self.counts.get(token, 0) + weight
        self.total += weight
        best = self.best
        if token in best:
            best.remove(token)
        elif len(best) == keep:
            if self.counts[best[-1]] > count:
                return
            best.pop()
        place = len(best)
        while place and self.counts[best[place - 1]] <= count:
            place -= 1
        best.insert(place, token)


_Key = int | tuple[int, int]  # bi-gram contexts are tokens, tri-gram contexts pairs


class TrigramCounts:
    """Counts of the tri-grams and bi-grams of a corpus; fixed, shared by requests. `branching` as in the settings."""

    def __init__(self, sequences: Iterable[Sequence[int]] = (), *, branching: int = 8) -> None:
        self.branching = branching
        self.contexts: dict[_Key, _Context] = {}
        for sequence in sequences:
            for end, token in enumerate(sequence):
                for key in _contexts(sequence[max(end - 2, 0) : end]):
                    self.contexts.setdefault(key, _Context()).add(token, 1, branching)


def _contexts(before: Sequence[int]) -> list[_Key]:
    """Give the contexts, bi-gram first, that the last one or two tokens make."""
    if len(before) < 2:
        return [int(token) for token in before]
    return [int(before[1]), (int(before[0]), int(before[1]))]


class _Node:
    """A visited node of the search: prior M, visits, summed value, candidates (None until asked for)."""

    __slots__ = ("candidates", "children", "index", "prior", "token", "total", "visits")

    def __init__(self, token: int, prior: float, index: int) -> None:
        self.token, self.prior, self.index = token, prior, index
        self.visits, self.total = 0, 0.0
        self.candidates: list[tuple[int, float]] | None = None
        self.children: dict[int, _Node] = {}


class TrigramProposer:
    """Drafts trees by search over counts of a corpus and of the request, which counts on in copies of its own."""

    def __init__(self, settings: TrigramSettings, corpus: TrigramCounts | None = None) -> None:
        if corpus is not None and corpus.branching != settings.branching:
            text = f"branching: must be {corpus.branching}, as in the counts of the corpus, got {settings.branching}"
            refuse("tri-gram", (False, text))
        self._settings = settings
        self._corpus = corpus.contexts if corpus is not None else {}
        self._own: dict[_Key, _Context] = {}
        self._before: list[int] = []

    def extend(self, tokens: Iterable[int]) -> None:
        """Append committed tokens and count them."""
        for token in tokens:
            for key in _contexts(self._before):
                context = self._own.get(key)
                if context is None:
                    context = self._own[key] = _Context(self._corpus.get(key))
                context.add(token, self._settings.online_weight, self._settings.branching)
            self._before = [*self._before[-1:], token]

    def probabilities(self, before: Sequence[int]) -> list[tuple[int, float]]:
        """Give the candidates after the last tokens `before` with M, the most probable first."""
        if not before:
            return []
        pair = self._context((before[-2], before[-1])) if len(before) > 1 else None
        single = self._context(before[-1])
        if single is None:
            return []
        smooth, total = self._settings.back_off, single.total
        if pair is None:
            return [(token, single.counts[token] / total) for token in single.best]
        scale, seen = 1 / (pair.total + smooth), pair.counts
        tokens = dict.fromkeys([*pair.best, *single.best])
        found = [(x, (seen.get(x, 0) + smooth * single.counts.get(x, 0) / total) * scale) for x in tokens]
        found.sort(key=lambda item: -item[1])
        return found[: self._settings.branching]

    def propose(self, draft_tokens: int) -> Draft:
        """Give the tree of the nodes that the search visits."""
        settings = self._settings
        root = _Node(-1, 1.0, -1)
        tokens: list[int] = []
        parents: list[int] = []
        for _ in range(settings.simulations):
            if len(tokens) == settings.nodes or not self._simulate(root, tokens, parents):
                break
        return cut(breadth_first(tokens, parents), draft_tokens)

    def _context(self, key: _Key) -> _Context | None:
        return self._own.get(key) or self._corpus.get(key)

    def _simulate(self, root: _Node, tokens: list[int], parents: list[int]) -> bool:
        """Go down once and add at most one node; False where the text has no candidates at all."""
        settings, node, path = self._settings, root, [root]
        while len(path) <= settings.max_draft_tokens:
            if node.candidates is None:
                node.candidates = self.probabilities(self._tail(path))
            if not node.candidates:
                break
            token, prior = self._select(node)
            known = node.children.get(token)
            if known is None:
                known = node.children[token] = _Node(token, prior, len(tokens))
                tokens.append(token)
                parents.append(node.index)
                path.append(known)
                break
            node = known
            path.append(node)
        value = 0.0
        for node in reversed(path[1:]):
            value = node.prior * (1 / settings.max_draft_tokens + value)
            node.visits += 1
            node.total += value
        root.visits += 1
        return len(path) > 1

    def _select(self, node: _Node) -> tuple[int, float]:
        """Give the candidate of largest PUCT score."""
        scale, children = self._settings.exploration * sqrt(node.visits), node.children
        best, top = node.candidates[0], -1.0  # type: ignore[index]
        for candidate in node.candidates:  # type: ignore[union-attr]
            child = children.get(candidate[0])
            if child is None:
                score = scale * candidate[1]
            else:
                score = child.total / child.visits + scale * candidate[1] / (1 + child.visits)
            if score > top:
                best, top = candidate, score
        return best

    def _tail(self, path: list[_Node]) -> list[int]:
        """Give the last two tokens of the committed text and the path."""
        return [*self._before, *(node.token for node in path[1:][-2:])][-2:]
