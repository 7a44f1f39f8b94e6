"""Every class of the model mappings of transformers which can be built tiny: trained exactly, or refused with a sentence.

By hand: `pytest -m sweep -n 0 -s tests/trainer/checks/test_model_sweep.py` prints the rows of the support matrix.
"""

from __future__ import annotations

import pytest
from model_sweep import HEADER, MAPPINGS, sweep, table

# Classes of transformers whose own loss is no cross entropy of one label per logit.
REFUSED = {"ProphetNetForCausalLM", "ProphetNetForConditionalGeneration"}  # several tokens ahead at each position
# At least so many classes of each mapping run tiny: a sweep of nothing would pass.
LEAST = {
    "CAUSAL_LM": 140, "SEQ_TO_SEQ_CAUSAL_LM": 30, "SPEECH_SEQ_2_SEQ": 8, "IMAGE_TEXT_TO_TEXT": 40, "MASKED_LM": 35,
    "SEQUENCE_CLASSIFICATION": 70, "TOKEN_CLASSIFICATION": 60, "QUESTION_ANSWERING": 50, "MULTIPLE_CHOICE": 20,
    "IMAGE_CLASSIFICATION": 10,
}  # fmt: skip


@pytest.mark.sweep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("mapping", MAPPINGS)
def test_every_class_is_exact_or_refused_with_a_sentence(mapping):
    outcomes = sweep(mapping)
    print(f"\n{HEADER}\n{table(mapping, outcomes)}")
    assert [(o.model, o.errors) for o in outcomes if o.state == "wrong"] == []
    assert [(o.model, o.reason) for o in outcomes if o.state == "failed"] == []
    assert {o.model for o in outcomes if o.state == "refused"} <= REFUSED
    assert sum(o.state in ("exact", "refused") for o in outcomes) >= LEAST[mapping]
