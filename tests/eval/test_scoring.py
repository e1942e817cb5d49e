import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_llama

from nemo_longctx.config import ConfigError
from nemo_longctx.eval.hf import HFCausalModel
from nemo_longctx.eval.requests import Continuation, Generation, cost, plan_reading, share_work
from nemo_longctx.eval.scoring import Chunks, Scorer, Speed, choose, token_losses
from nemo_longctx.eval.sharing import cost_told, duration, new_tokens

VOCAB = 101
SMALL = Chunks(read=5, logits=3 * 4 * VOCAB)  # 5 tokens a pass, 3 rows of logits: every seam is crossed


def reference(model, request):
    """Log-probabilities of a continuation from one uncached pass with full logits."""
    tokens = torch.tensor([*request.context, *request.continuation])
    with torch.inference_mode():
        logits = model(tokens[None, :-1]).logits[0].float().log_softmax(-1)[len(request.context) - 1 :]
    targets = tokens[len(request.context) :]
    return logits.gather(-1, targets[:, None])[:, 0].numpy(), bool((logits.argmax(-1) == targets).all())


def never(_):
    return False


def check(model, requests, scores):
    for request, score in zip(requests, scores, strict=True):
        expected, greedy = reference(model, request)
        np.testing.assert_allclose(score.token_log_probs, expected, atol=2e-5)
        assert score.is_greedy == greedy
        assert score.log_likelihood == pytest.approx(expected.sum(), abs=1e-4)


class Counting(HFCausalModel):
    """Counts the tokens that were read."""

    read = 0

    def extend(self, tokens_S):
        self.read += len(tokens_S)
        return super().extend(tokens_S)


def test_a_document_is_read_once_for_all_its_questions_and_options(llama):
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, VOCAB, 60).tolist() for _ in range(2)]
    questions = [rng.integers(0, VOCAB, 9).tolist() for _ in range(5)]
    options = [rng.integers(0, VOCAB, 4).tolist() for _ in range(4)]
    requests = [Continuation(context=d + q, continuation=o) for q in questions for o in options for d in documents]
    model = Counting(llama)
    model.read = 0
    scores = Scorer(model, chunks=SMALL).score(requests)
    assert model.read == sum(len(step.tokens) - step.shared for step in plan_reading(requests))
    assert model.read <= 2 * (60 + 5 * (9 + 4 * 3))
    check(llama, requests, scores)


# Few tokens and short lists make prefixes that nest, repeat, end inside one another and split within continuations.
TOKENS = st.lists(st.integers(0, 2), min_size=1, max_size=9)
CONTINUATIONS = st.builds(lambda c, t: Continuation(context=c, continuation=t), TOKENS, TOKENS)
GENERATIONS = st.builds(lambda c, n: Generation(context=c, max_new_tokens=n, stop=never), TOKENS, st.integers(1, 4))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.one_of(CONTINUATIONS, GENERATIONS), max_size=8), st.integers(1, 7), st.integers(1, 4))
def test_shared_prefixes_change_no_result(llama, requests, read, rows):
    model = HFCausalModel(llama)
    chunks = Chunks(read=read, logits=rows * 4 * VOCAB)
    shared = {index: result for index, result, _ in Scorer(model, chunks=chunks).run(requests)}
    plain = {index: result for index, result, _ in Scorer(model, share=False).run(requests)}
    assert set(shared) == set(plain) == set(range(len(requests)))
    for index, request in enumerate(requests):
        if isinstance(request, Generation):
            assert shared[index] == plain[index]
        else:
            check(llama, [request, request], [shared[index], plain[index]])


def test_adversarial_prefixes(llama):
    """A request that is another's prefix, equal requests, one split inside another's continuation, one token apart."""
    rng = np.random.default_rng(1)
    line = rng.integers(0, VOCAB, 40).tolist()
    requests = [Continuation(context=line[:i], continuation=line[i:j]) for i in (1, 7, 20, 39) for j in (21, 25, 40) if i < j]
    requests += [Continuation(context=line[:20], continuation=[t]) for t in range(20)]
    requests += [Continuation(context=[*line[:20], 5], continuation=line[21:]), requests[0], requests[0]]
    order = rng.permutation(len(requests))
    requests = [requests[i] for i in order]
    check(llama, requests, Scorer(HFCausalModel(llama), chunks=SMALL).score(requests))


def test_states_kept_for_later_are_only_those_wanted():
    a = Continuation(context=[1, 2, 3, 4, 5, 6, 7, 8], continuation=[9, 1])
    b = Continuation(context=[1, 2, 3, 4, 5, 6, 7, 8], continuation=[9, 2])
    c = Continuation(context=[1, 2], continuation=[3, 4, 9])
    steps = plan_reading([a, b, c])
    assert [step.index for step in steps] == [2, 0, 1] or [step.index for step in steps] == [0, 1, 2]
    for step, following in itertools.pairwise(steps):
        assert all(end <= following.shared for _, end in step.later)
    assert steps[-1].later == ()


def test_greedy_generation_is_transformers_own(llama):
    rng = np.random.default_rng(2)
    stem = rng.integers(0, VOCAB, 30).tolist()
    contexts = [stem, stem[:12], [*stem, 4], [*stem, 4, 5], stem]
    got = Scorer(HFCausalModel(llama), chunks=SMALL).generate(
        [Generation(context=c, max_new_tokens=12, stop=lambda made: made[-1] == 7) for c in contexts]
    )
    for context, made in zip(contexts, got, strict=True):
        out = llama.generate(torch.tensor([context]), max_new_tokens=12, do_sample=False, eos_token_id=7, pad_token_id=0)
        assert made == out[0, len(context) :].tolist()


def test_sampling_depends_on_seed_and_context_only(llama):
    scorer = Scorer(HFCausalModel(llama))

    def sample(contexts, **more):
        options = {"max_new_tokens": 8, "stop": never, "temperature": 1.5, **more}
        return scorer.generate([Generation(context=c, **options) for c in contexts])

    together = sample([[1, 2], [1, 2, 3], [4]])
    state = torch.get_rng_state()
    assert [sample([c])[0] for c in ([1, 2], [1, 2, 3], [4])] == together
    assert sample([[4], [1, 2]], seed=1) != [together[2], together[0]]
    # Where every token is as likely as any other, only the draw can tell two prompts apart.
    flat = copy.deepcopy(llama)
    torch.nn.init.zeros_(flat.lm_head.weight)
    scorer = Scorer(HFCausalModel(flat))
    one, two = sample([[1, 2], [4]])
    assert one != two
    assert torch.equal(torch.get_rng_state(), state)
    assert sample([[1, 2]], top_k=1) == sample([[1, 2]], temperature=0.0) == sample([[1, 2]], top_p=1e-9)


@pytest.mark.parametrize("scaling", [{"rope_type": "dynamic", "factor": 4.0}])
def test_length_dependent_frequencies_are_not_shared(scaling):
    model = tiny_llama(length=16, rope_scaling=scaling)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 60).tolist()
    requests = [Continuation(context=tokens[:n], continuation=tokens[n : n + 3]) for n in (10, 30, 50)]
    scorer = Scorer(HFCausalModel(model, max_length=64), chunks=SMALL)
    for request, score in zip(requests, scorer.score(requests), strict=True):
        # transformers grows the table and never shrinks it: compare with a fresh reading of the same state.
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.original_inv_freq
        model.model.rotary_emb.max_seq_len_cached = 16
        np.testing.assert_allclose(score.token_log_probs, reference(model, request)[0], atol=2e-5)


def test_an_input_has_the_frequencies_of_its_own_length_whatever_was_read_before():
    """Under dynamic NTK transformers keeps those of the longest input until one within the trained length comes."""

    def fresh():
        return Scorer(HFCausalModel(tiny_llama(length=16, rope_scaling={"rope_type": "dynamic", "factor": 4.0}), max_length=64))

    tokens = np.random.default_rng(0).integers(3, VOCAB, 60).tolist()
    requests = [Continuation(context=[n, *tokens[:length]], continuation=[5]) for n, length in enumerate((55, 30, 15, 40))]
    together, alone = fresh().score(requests), [fresh().score([request])[0] for request in requests]
    assert [one.log_likelihood for one in together] == pytest.approx([one.log_likelihood for one in alone], abs=1e-5)


def test_token_losses_is_the_loss_of_every_position(llama):
    tokens = np.random.default_rng(0).integers(0, VOCAB, 50).tolist()
    expected = -reference(llama, Continuation(context=tokens[:1], continuation=tokens[1:]))[0]
    np.testing.assert_allclose(token_losses(HFCausalModel(llama), tokens, chunks=SMALL), expected, atol=2e-5)


def test_work_is_shared_by_cost_and_documents_stay_whole():
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, VOCAB, n).tolist() for n in (400, 300, 300, 200, 200, 200, 20, 20, 20)]
    requests = [Continuation(context=[*d, q], continuation=[o]) for d in documents for q in range(4) for o in range(4)]
    for ranks in (1, 2, 3, 4):
        work = share_work(requests, ranks)
        assert sorted(i for part in work for i in part) == list(range(len(requests)))
        costs = [cost(plan_reading([requests[i] for i in part])) for part in work]
        assert sum(costs) <= 1.05 * cost(plan_reading(requests))  # no document is read on two ranks
        assert max(costs) <= max(1.3 * sum(costs) / ranks, 1.05 * 420**2)
    assert share_work(requests[:1], 3).count([]) == 2
    assert share_work([], 2) == [[], []]


def test_one_long_list_of_short_requests_is_spread():
    requests = [Continuation(context=[1, 2, 3, i % VOCAB, i // VOCAB, *range(20)], continuation=[4]) for i in range(400)]
    sizes = [len(part) for part in share_work(requests, 4)]
    assert min(sizes) > 60


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Continuation(context=[], continuation=[1]), "request 0 has an empty context"),
        (Continuation(context=[1], continuation=[]), "empty context or continuation"),
        (Continuation(context=[1] * 600, continuation=[1]), "needs 600 tokens of context, the model reads 512"),
        (Generation(context=[1] * 500, max_new_tokens=20, stop=never), "needs 520 tokens"),
        (Continuation(context=[1], continuation=[VOCAB]), "outside 0..100"),
    ],
)
def test_impossible_requests_are_refused(llama, request_, message):
    with pytest.raises(ValueError, match=message):
        list(Scorer(HFCausalModel(llama)).run([request_]))


class Broken(HFCausalModel):
    """Its numbers are none from a length on."""

    def log_probs(self, states_KH, targets_K):
        found, greedy = super().log_probs(states_KH, targets_K)
        return torch.where(torch.arange(len(found)) == 1, torch.nan, found), greedy

    def next_logits(self, state_H):
        logits = super().next_logits(state_H)
        logits[7] = torch.nan
        return logits


def test_what_is_no_number_is_no_answer():
    """A reply of token 7, and an accuracy over NaN, looked like a model that knows nothing."""
    scorer = Scorer(Broken(tiny_llama()))
    with pytest.raises(ValueError, match=r"after 4 tokens are no numbers \(NaN\)"):
        scorer.score([Continuation(context=[1, 2, 3], continuation=[4, 5, 6])])
    for temperature in (0.0, 1.0):
        with pytest.raises(ValueError, match=r"after 3 tokens are no numbers \(NaN\)"):
            scorer.generate([Generation(context=[1, 2, 3], max_new_tokens=2, stop=never, temperature=temperature)])


def test_bad_settings_are_refused():
    for bad in ({"temperature": -1}, {"top_p": 0.0}, {"top_k": -1}):
        with pytest.raises(ConfigError, match=next(iter(bad))):
            Generation(context=[1], max_new_tokens=1, stop=never, **bad)
    with pytest.raises(ConfigError, match=r"chunks\.read"):
        Chunks(read=0)


def test_a_head_that_does_more_than_a_product_is_found_out():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, final_logit_softcapping=0.05, initializer_range=0.5,
    )  # fmt: skip
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        HFCausalModel(Gemma2ForCausalLM(config))


def test_the_cost_is_told_before_it_starts(llama, capsys):
    from nemo_longctx.eval.sharing import run_shared

    document = list(range(2, 60))
    jobs = [Continuation(context=document, continuation=[n]) for n in (3, 4)]
    jobs.append(Generation(context=document, max_new_tokens=2, stop=lambda made: False))
    scorer = Scorer(HFCausalModel(llama))
    run_shared(scorer, jobs, what="a suite")
    told = capsys.readouterr().err
    assert "a suite: 58 tokens to read (174 without what prompts share), at most 2 to make, about 1 s" in told
    first = scorer.speed
    assert min(first.read, first.made) > 0
    twice = first.corrected(100, 0, first.seconds(100, 0) / 2)
    assert twice.read == pytest.approx(2 * first.read)
    assert [duration(s) for s in (0.2, 89, 91, 7200)] == ["1 s", "89 s", "2 min", "2.0 h"]


@pytest.mark.parametrize("top_k", [0, 1, 3])
@pytest.mark.parametrize("top_p", [0.001, 0.6, 0.9, 1.0])
def test_a_draw_is_within_the_fewest_tokens_that_hold_top_p(top_p, top_k):
    """And each of them is drawn, as often as its share of them."""
    probs = torch.tensor([0.05, 0.2, 0.1, 0.25, 0.15, 0.125, 0.125])
    held, within = 0.0, []
    for token in sorted(range(7), key=lambda token: (-probs[token], token))[: top_k or None]:
        if held < top_p - 1e-7:
            within.append(token)
        held += float(probs[token])
    request = Generation(context=[1], max_new_tokens=1, stop=lambda made: False, temperature=2.0, top_p=top_p, top_k=top_k)
    random = torch.Generator().manual_seed(0)
    drawn = torch.tensor([choose(probs.log() * 2, request, random) for _ in range(500)]).bincount(minlength=7) / 500
    share = torch.zeros(7)
    share[within] = probs[within] / probs[within].sum()
    assert ((drawn > 0) == (share > 0)).all()
    assert (drawn - share).abs().max() < 0.1
    assert choose(probs.log(), request, None) == 3


class Spy:
    """A model that counts: the next token is one more than the last, and every call is on record."""

    vocab_size, max_length, reads_whole = 50, 12, False

    def __init__(self, **more):
        self.cache, self.extended, self.scored = [], [], []
        self.__dict__.update(more)

    def extend(self, tokens_S):
        self.cache += tokens_S.tolist()
        self.extended.append(tokens_S.tolist())
        return tokens_S[:, None].float()

    def truncate(self, length):
        del self.cache[length:]

    def log_probs(self, states_KH, targets_K):
        self.scored.append(len(states_KH))
        return -targets_K.float(), targets_K == states_KH[:, 0].long() + 1

    def next_logits(self, state_H):
        return torch.nn.functional.one_hot(state_H[0].long() + 1, self.vocab_size).float()


def asked(context, continuation):
    return Continuation(context=context, continuation=continuation)


def made(context, new, stop=never):
    return Generation(context=context, max_new_tokens=new, stop=stop)


def test_a_request_may_be_as_long_as_the_model_reads_and_its_tokens_all_of_the_vocabulary():
    scorer = Scorer(Spy())
    scorer.check([asked([0] * 12, [49]), asked([0] * 3, [49] * 10), made([49] * 8, 4)])
    for request, said in (
        (asked([0] * 13, [1]), "request 1 needs 13 tokens of context, the model reads 12"),
        (asked([0] * 3, [1] * 11), "request 1 needs 13 tokens"),
        (made([0] * 8, 5), "request 1 needs 13 tokens"),
        (asked([1], [50]), "request 1 has token ids outside 0..49"),
        (asked([-1], [1]), "outside 0..49"),
        (made([1, 50], 1), "outside 0..49"),
        (made([-1], 1), "outside 0..49"),
    ):
        with pytest.raises(ValueError, match=said):
            scorer.check([asked([1], [1]), request])


def test_no_more_is_held_at_once_than_asked_and_the_cache_is_left_empty():
    spy, told = Spy(cache=[7, 7, 7]), []
    requests = [asked([1, 2, 3, 4], [5, 6, 7, 8, 9]), asked([1, 2, 3, 4], [5, 9]), made([1, 2, 3, 4, 5, 6], 3)]
    scorer = Scorer(spy, chunks=Chunks(read=3, logits=2 * 4 * 50 + 3))
    first, second = scorer.score(requests[:2], progress=told.append)
    assert (max(map(len, spy.extended)), max(spy.scored)) == (3, 2)
    assert (first.is_greedy, second.is_greedy) == (True, False)
    assert first.log_likelihood == -35
    assert spy.cache == []
    assert sum(told) == 8 == new_tokens(scorer, requests)  # [1 .. 8] holds what all three read
    assert scorer.generate(requests[2:]) == [[7, 8, 9]]
    assert spy.cache == []
    assert Chunks() == Chunks(read=1024, logits=67_108_864)
    spy = Spy(max_length=20)
    losses = token_losses(spy, list(range(10)), chunks=Chunks(read=4))
    assert losses.tolist() == [float(token) for token in range(1, 10)]
    assert [len(part) for part in spy.extended] == [4, 4, 1]


def test_a_model_that_reads_whole_is_given_all_tokens_each_time():
    spy = Spy(reads_whole=True)
    scorer = Scorer(spy, chunks=Chunks(read=2))
    assert scorer.generate([made([3, 4, 5], 3)]) == [[6, 7, 8]]
    assert spy.extended == [[3, 4, 5], [3, 4, 5, 6], [3, 4, 5, 6, 7]]
    assert [step.shared for step in scorer.plan([made([3, 4, 5], 1), asked([3, 4], [5])])] == [0, 0]
    assert [step.shared for step in Scorer(Spy()).plan([made([3, 4, 5], 1), asked([3, 4], [5])])] == [0, 2]
    assert scorer.generate([made([3], 9, stop=lambda tokens: tokens[-1] == 6)]) == [[4, 5, 6]]


def test_a_speed_tells_seconds_and_is_corrected_by_what_was_seen():
    speed = Speed(read=100.0, made=10.0)
    assert speed.seconds(50, 2) == pytest.approx(0.7)
    slower = speed.corrected(50, 2, 1.4)
    assert (slower.read, slower.made) == (pytest.approx(50.0), pytest.approx(5.0))
    faster = speed.corrected(50, 2, 0.35)
    assert (faster.read, faster.made) == (pytest.approx(200.0), pytest.approx(20.0))
    assert speed.corrected(0, 0, 3.0) == speed
    assert [duration(s) for s in (89.6, 90, 5399, 5400, 0)] == ["90 s", "2 min", "90 min", "1.5 h", "1 s"]
    jobs = [asked([1] * 900, [1, 1]), made([1] * 600, 300), made([1] * 2, 1700)]
    assert cost_told(jobs, 1503, speed) == "1,503 tokens to read, at most 2,000 to make, about 4 min"
    assert cost_told(jobs[:1], 700, speed) == "700 tokens to read (901 without what prompts share), about 7 s"


def test_a_share_of_work_is_cut_where_prompts_share_least():
    """By hand: documents of 100 and of 60 tokens with four questions each stay whole, and the dearest goes first."""
    documents = [[1] * 100, [2] * 60]
    requests = [asked([*document, 3, n], [4]) for n in range(4) for document in documents]
    assert share_work(requests, 2) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert share_work(requests, 1) == [[0, 2, 4, 6, 1, 3, 5, 7]]
    assert cost(plan_reading(requests)) == 102**2 + 3 * (102**2 - 101**2) + 62**2 + 3 * (62**2 - 61**2)
    assert cost(plan_reading(requests, share=False)) == 4 * 102**2 + 4 * 62**2
    single = [asked([n] * (10 + n), [1]) for n in range(8)]  # nothing shared: each goes to the rank with least work so far
    loads = [0, 0, 0]
    expected = [[], [], []]
    for n in range(7, -1, -1):
        rank = loads.index(min(loads))
        loads[rank] += (10 + n) ** 2
        expected[rank].append(n)
    assert share_work(single, 3) == expected


def test_the_length_and_the_ends_of_a_multimodal_model_are_those_of_its_language_model():
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = sizes | {"vocab_size": VOCAB, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 77}
    vision = sizes | {"image_size": 8, "patch_size": 4}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    theirs = Gemma3ForConditionalGeneration(config).eval()
    theirs.generation_config.eos_token_id = [1, 100]
    model = HFCausalModel(theirs)
    assert (model.max_length, model.ends) == (77, {1, 100})
    assert HFCausalModel(theirs, max_length=9).max_length == 9
    request = Continuation(context=[5, 6, 7], continuation=[8, 9])
    logits = theirs(torch.tensor([[5, 6, 7, 8]])).logits[0].float().log_softmax(-1)
    (score,) = Scorer(model).score([request])
    np.testing.assert_allclose(score.token_log_probs, logits[[2, 3], [8, 9]].detach().numpy(), atol=1e-4)


def test_a_model_that_says_no_longest_input_is_told_one():
    from transformers import BloomConfig, BloomForCausalLM

    theirs = BloomForCausalLM(BloomConfig(vocab_size=20, hidden_size=8, n_layer=1, n_head=2)).eval()
    with pytest.raises(ConfigError, match="--max-length=None: BloomForCausalLM says no longest input"):
        HFCausalModel(theirs)
    assert HFCausalModel(theirs, max_length=30).max_length == 30
