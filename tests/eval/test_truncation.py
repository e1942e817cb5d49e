import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.truncation import POLICIES, prompt_budget, token_span, truncate


@given(st.integers(0, 40), st.integers(1, 50), st.sampled_from(POLICIES), st.integers(0, 30), st.integers(1, 10))
def test_budget_is_kept_and_losses_are_told(length, budget, policy, start, width):
    tokens = list(range(length))
    span = (min(start, length), min(start + width, length))
    cut = truncate(tokens, budget, policy, {"question": span})
    assert len(cut.tokens) == min(length, budget)
    assert cut.removed == max(0, length - budget)
    assert cut.tokens == sorted(cut.tokens)  # what is left keeps its order
    whole = set(range(*span)) <= set(cut.tokens)
    assert (cut.lost == ()) == whole
    if policy == "keep_question" and span[1] - span[0] <= budget:
        assert whole


def test_each_policy():
    tokens = list(range(10))
    assert truncate(tokens, 4, "left").tokens == [6, 7, 8, 9]
    assert truncate(tokens, 5, "middle").tokens == [0, 1, 2, 8, 9]
    assert truncate(tokens, 5, "keep_question", {"question": (0, 2)}).tokens == [0, 1, 7, 8, 9]
    assert truncate(tokens, 5, "left", {"question": (0, 2)}).lost == ("question",)
    assert truncate(tokens, 5, "middle", {"needle": (4, 6), "question": (8, 10)}).lost == ("needle",)


@pytest.mark.parametrize("policy", POLICIES)
def test_bos_and_chat_header_stay(policy):
    tokens = list(range(20))
    spans = {"question": (17, 20)}
    for budget in range(7, 20):
        cut = truncate(tokens, budget, policy, spans, frame=4)
        assert cut.tokens[:4] == [0, 1, 2, 3]
        assert len(cut.tokens) == budget
        assert "chat header" not in cut.lost
    assert truncate(tokens, 3, policy, spans, frame=4).lost == ("question", "chat header")


def test_zeroscrolls_keeps_the_start():
    cut = truncate(list(range(10)), 6, "keep_start", {"instruction": (0, 2), "question": (8, 10)})
    assert (cut.tokens, cut.removed, cut.lost) == ([0, 1, 2, 3, 8, 9], 4, ())


def test_users_mistakes():
    with pytest.raises(ConfigError, match="did you mean 'middle'"):
        truncate([1], 1, "midle")
    with pytest.raises(ConfigError, match="leaves no prompt"):
        prompt_budget(100, 100)
    with pytest.raises(ConfigError, match="leaves no prompt"):
        truncate([1, 2], 0, "left")
    assert prompt_budget(100, 20) == 80
    assert prompt_budget(100, 20, 50) == 50


def test_token_span_covers_the_characters():
    offsets = [(0, 0), (0, 3), (3, 4), (4, 9), (9, 12)]  # a special token first
    assert token_span(offsets, 3, 9) == (2, 4)
    assert token_span(offsets, 5, 6) == (3, 4)
    assert token_span(offsets, 0, 12) == (1, 5)


def plainly(length, budget, policy, spans, frame):
    """Numbers of the tokens that are left, taken out one after the other in the order that the policy's words say."""
    left = list(range(length))
    if length <= budget:
        return left
    if policy == "middle":
        head = max(-(-budget // 2), frame)
        return left[: min(head, budget)] + left[length - max(0, budget - head) :]
    body, top = [t for t in left if t >= frame], [t for t in left if t < frame]
    question = spans.get("question", (length, length))[0]
    held = {t for start, end in spans.values() for t in range(start, end)}
    order = {
        "left": body,
        "keep_question": [t for t in body if t not in held] + [t for t in body if t in held],
        "keep_start": [t for t in reversed(body) if t < question] + [t for t in body if t >= question],
    }[policy]
    gone = set((order + top)[: length - budget])
    return [t for t in left if t not in gone]


@given(
    st.integers(0, 30), st.integers(1, 32), st.sampled_from(POLICIES), st.integers(0, 6),
    st.dictionaries(st.sampled_from(["question", "instruction"]), st.tuples(st.integers(0, 28), st.integers(1, 8))),
)  # fmt: skip
def test_what_is_cut_is_what_the_plain_way_cuts(length, budget, policy, frame, spans):
    spans = {name: (min(start, length), min(start + size, length)) for name, (start, size) in spans.items()}
    cut = truncate(range(length), budget, policy, spans, frame=frame)
    left = plainly(length, budget, policy, spans, frame)
    assert cut.tokens == left
    assert cut.removed == length - len(left)
    lost = [name for name, span in spans.items() if not set(range(*span)) <= set(left)]
    assert cut.lost == (*lost, *(["chat header"] if not set(range(min(frame, length))) <= set(left) else []))


def test_a_prompt_has_what_the_generation_leaves_down_to_one_token():
    assert prompt_budget(100, 99) == 1
    assert prompt_budget(100, 40, 60) == prompt_budget(100, 40, 61) == 60
    with pytest.raises(ConfigError, match="max_gen_toks=100: leaves no prompt within 100 tokens"):
        prompt_budget(100, 100, 5)
    assert truncate([1, 2], 1, "left").tokens == [2]
