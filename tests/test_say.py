"""A forced answer under everything that changes logits behind it, and behind marks of reasoning."""

from __future__ import annotations

import pytest

import helpers
from steerbridge import reference
from steerbridge.errors import InvalidSpec, ModelMismatch
from steerbridge.spec import Say
from steerbridge.testing import cases
from steerbridge.testing.cases import rule, says
from steerbridge.testing.driver import Files
from steerbridge.testing.model import EOS, PAD, TinyModel

NO = [*b"No.", EOS]
PROMPT = "tell me"
MARKS = {"open": list(b"<<"), "close": list(b">>")}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return Files(TinyModel(), tmp_path_factory.mktemp("say"))


def always(files, **more):
    """A package that says something at every prompt's end."""
    rules = [rule(None, ["s"])]
    return cases.case(files.model, [], [says(**more)], rules, prompts=["a", "b"]).package


# ---------------------------------------------------------------- the script


@pytest.mark.parametrize(
    ("ids", "end", "said"),
    [
        (b"hello", 4, b"H|No"),  # at the prompt's end: the marks of an answer first
        (b"hello you", 4, b"No"),  # in the middle of it
        (b"a << b", 5, b">>H|No"),  # a block of reasoning that the prompt opens
        (b"a << b >> c", 10, b"H|No"),
        (b"a << b >> c << d", 4, b">>H|No"),  # one that the answer opens
        (b"a << b >> c", 3, b"No"),
    ],
)
def test_a_block_of_reasoning_is_closed_first(ids, end, said):
    say = Say.model_validate(
        says("No", tokens=list(b"No"), header=list(b"H|"), reasoning=MARKS), strict=False
    )
    assert bytes(reference.script(say, list(ids), end)) == said


def test_what_is_said_has_no_second_best():
    forced = reference.said([4, 7], 0, 9)
    assert forced.tolist() == [reference.UNSAID if i != 4 else 0 for i in range(9)]
    assert reference.said([4, 7], 5, 9).argmax() == 7  # behind the last token, the last again


def test_ids_that_the_model_does_not_have_are_refused():
    with pytest.raises(InvalidSpec, match=r"interventions\[0\]\.tokens: expected token ids below"):
        helpers.package(
            interventions=[says(id="h", tokens=[helpers.FACTS.vocab_size])],
        )


# ---------------------------------------------------------------- transformers

CHANGES = {
    "greedy": {},
    "temperature 2": {"do_sample": True, "temperature": 2.0},
    "a penalty": {"repetition_penalty": 5.0},
    "a bias": {"sequence_bias": [[[104], 1000.0]]},
    "the two likeliest": {"do_sample": True, "top_k": 2, "temperature": 3.0},
    "beams": {"num_beams": 3},
    "several samples": {"do_sample": True, "num_return_sequences": 3},
    "drafts": {"prompt_lookup_num_tokens": 3},
    "no cache": {"use_cache": False},
}


@pytest.fixture(scope="module")
def hf(files):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModelForCausalLM.from_pretrained(files.transformers).eval()


def answers(hf, package, prompt=PROMPT, **options):
    import torch

    from steerbridge_hf import steer

    ids = torch.tensor([TinyModel.encode(prompt)])
    with steer(hf, package):
        out = hf.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=8,
            pad_token_id=PAD,
            **{"do_sample": False, **options},
        )
    return [[t for t in row if t != PAD] for row in out[:, ids.shape[1] :].tolist()]


@pytest.mark.hf
@pytest.mark.parametrize("options", CHANGES.values(), ids=CHANGES)
def test_transformers_says_it(files, hf, options):
    for answer in answers(hf, always(files), **options):
        assert answer == NO


@pytest.mark.hf
@pytest.mark.parametrize(
    ("options", "free"),
    [
        ({"bad_words_ids": [[78]]}, {0}),  # N
        ({"suppress_tokens": [111]}, {1}),  # o
        ({"min_new_tokens": 6}, {3, 4, 5}),  # the end, three times
    ],
)
def test_transformers_says_nothing_of_the_models_own(files, hf, options, free):
    """Where the token is banned, any of the others is as likely: the first id, if greedy."""
    [answer] = answers(hf, always(files), **options)
    wanted = [*NO, *[EOS] * 8][: len(answer)]
    assert {i for i, (a, b) in enumerate(zip(answer, wanted, strict=True)) if a != b} <= free
    assert {answer[i] for i in free if i < len(answer)} <= {0, EOS}


@pytest.mark.hf
def test_transformers_closes_a_block_of_reasoning(files, hf):
    package = always(files, reasoning=MARKS, header=list(b":"))
    assert answers(hf, package, "think << of")[0] == [*b">>:No.", EOS]
    assert answers(hf, package, "think << of >>")[0] == [*b":No.", EOS]


@pytest.mark.hf
def test_transformers_compares_the_text_with_the_tokens(files, hf):
    transformers = pytest.importorskip("transformers")
    from steerbridge_hf import steer

    tokenizer = transformers.AutoTokenizer.from_pretrained(files.transformers)
    with steer(hf, always(files), tokenizer=tokenizer):
        pass
    with pytest.raises(ModelMismatch, match=r"intervention s: expected 'Yes\.', found 'No\.'"):
        steer(hf, always(files, text="Yes.", tokens=NO), tokenizer=tokenizer)


# ---------------------------------------------------------------- llama.cpp


@pytest.fixture(scope="module")
def llama(files):
    llama_cpp = pytest.importorskip("llama_cpp")
    return llama_cpp.Llama(str(files.gguf), n_ctx=256, n_threads=1, verbose=False)


def said(llama, package, prompt=PROMPT, **options):
    from steerbridge_llama_cpp import steer

    with steer(llama, package):
        tokens = []
        for token in llama.generate(TinyModel.encode(prompt), **options):
            tokens.append(int(token))
            if token == EOS or len(tokens) == 8:
                return tokens
    raise AssertionError("it ended before its end")


@pytest.mark.llama_cpp
@pytest.mark.parametrize(
    "options",
    [
        {"temp": 0.0},
        {"temp": 2.0},
        {"temp": 5.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
        {"temp": 0.0, "repeat_penalty": 3.0, "frequency_penalty": 2.0, "presence_penalty": 2.0},
        {"temp": 1.0, "mirostat_mode": 2},
    ],
)
def test_llama_cpp_says_it(files, llama, options):
    assert said(llama, always(files), **options) == NO


@pytest.mark.llama_cpp
def test_llama_cpp_says_it_against_a_bias(files, llama):
    import llama_cpp
    import numpy as np

    bias = np.zeros(llama.n_vocab(), np.float32)
    bias[104] = 1000.0
    add = llama_cpp.LogitsProcessorList([lambda _, scores: scores + bias])
    assert said(llama, always(files), temp=0.0, logits_processor=add) == NO


@pytest.mark.llama_cpp
def test_a_grammar_chooses_among_equals(files, llama):
    """It cannot have the sentence, and gets nothing of the model's own either."""
    import llama_cpp

    grammar = llama_cpp.LlamaGrammar.from_string('root ::= "yes"', verbose=False)
    assert bytes(said(llama, always(files), temp=0.0, grammar=grammar)[:3]) == b"yes"


@pytest.mark.llama_cpp
def test_llama_cpp_compares_the_text_with_the_tokens(files, llama):
    with pytest.raises(ModelMismatch, match=r"intervention s: expected 'Yes\.', found 'No\.'"):
        said(llama, always(files, text="Yes.", tokens=NO))


@pytest.mark.llama_cpp
def test_llama_cpp_closes_a_block_of_reasoning(files, llama):
    package = always(files, reasoning=MARKS, header=list(b":"))
    assert said(llama, package, "think << of", temp=0.0) == [*b">>:No.", EOS]
    assert said(llama, package, "think << of >>", temp=0.0) == [*b":No.", EOS]
