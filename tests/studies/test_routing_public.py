"""Mixed traffic from published acceptance lists."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.routing.served import Server, own_prices
from calibration.common.errors import TraceError
from studies.public.routing import mixed_traffic, published_prices


def test_public_files_become_one_mixed_traceset(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match=r"must hold combined_<dataset>\.jsonl files, got none"):
        mixed_traffic(tmp_path)
    for name in ("maths", "talk"):
        lines = [
            json.dumps(
                {
                    "id": str(i),
                    "prompt_token_ids": [1, 2, 3, i],
                    "generated_token_ids": [9, 3, 4, 5, 8],
                    # The last request of each file has an EAGLE list of another text: not recorded with both.
                    "acc_eagle": {"acc_len": [3, 1, 2, 1] if i == 4 else [3, 1, 2, 1, 2]},
                    "acc_ngram": {"acc_len": [1, 1, 1, 1, 1]},
                }
            )
            for i in range(5)
        ]
        (tmp_path / f"combined_{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    whole = mixed_traffic(tmp_path)
    assert whole.sequences["sequence_id"].to_pylist() == [f"{d}/{i}" for d in ("maths", "talk") for i in range(4)]
    few = mixed_traffic(tmp_path, requests_per_domain=3)
    assert few.sequences["domain"].to_pylist() == ["maths"] * 3 + ["talk"] * 3
    published, per_step = published_prices()
    assert published.costs["drafters"]["eagle"]["charged"] == "per_round"
    assert per_step.costs["drafters"]["eagle"]["charged"] == "per_step"
    tables = [Server(few, ("eagle", "ngram"), priced).table(3) for priced in (published, per_step)]
    # A round of three draft tokens costs alike under both, up to what the tokens themselves add.
    assert tables[0].seconds[:, 0] == pytest.approx(tables[1].seconds[:, 0], rel=1e-3)
    assert own_prices(few).note.label == "stated"
