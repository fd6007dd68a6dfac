"""Every field of every body is honoured, harmless and documented so, or refused by its name."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("prometheus_client")

from pydantic import ValidationError

from console import ROOT
from steerbridge_serve import dialects, ollama, openai, tgi
from steerbridge_serve.asked import Asked

USER = {"role": "user", "content": "hi"}
LEAST = {
    openai.ChatCompletion: {"messages": [USER]},
    openai.RawCompletion: {"prompt": "hi"},
    openai.Moderation: {"input": "hi"},
    openai.ChatMessage: USER,
    openai.TextPart: {"type": "text", "text": "hi"},
    openai.ImagePart: {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}},
    openai.ImageUrl: {"url": "data:image/png;base64,AA=="},
    openai.ResponseFormat: {"type": "text"},
    openai.JsonSchema: {"schema": {}},
    openai.StreamOptions: {},
    tgi.Generate: {"inputs": "hi"},
    tgi.GenerateStream: {"inputs": "hi"},
    tgi.GenerateEither: {"inputs": "hi"},
    tgi.Tokenize: {"inputs": "hi"},
    tgi.Parameters: {},
    tgi.Grammar: {"type": "json", "value": {}},
    ollama.OllamaChat: {"messages": [USER]},
    ollama.OllamaGenerate: {"prompt": "hi"},
    ollama.Show: {},
    ollama.OllamaMessage: USER,
    ollama.Options: {},
}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
# A value of each field of sampling that is no default.
EFFECTS = {
    "max_tokens": 3,
    "max_completion_tokens": 3,
    "max_new_tokens": 3,
    "num_predict": 3,
    "temperature": 0.3,
    "do_sample": True,
    "top_k": 3,
    "top_p": 0.3,
    "min_p": 0.3,
    "typical_p": 0.3,
    "repetition_penalty": 1.3,
    "repeat_penalty": 1.3,
    "frequency_penalty": 0.3,
    "presence_penalty": 0.3,
    "seed": 3,
    "stop": ["x"],
    "stop_sequences": ["x"],
    "n": 2,
    "logit_bias": {"3": -1},
    "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}},
    "format": SCHEMA,
    "grammar": {"type": "json", "value": SCHEMA},
    "logprobs": True,
    "top_logprobs": 3,
    "top_n_tokens": 3,
    "steering": False,
    "system": "Be short.",
    "images": ["AA=="],
    "raw": True,
}
# Fields that show in the answer, not in what is asked.
SHOWN = {"stream", "stream_options", "return_full_text", "details", "model"}
# Fields that are the question.
QUESTION = {"messages", "prompt", "inputs", "parameters", "options", "input"}


def bodies():
    return [*{route.body for _, route in dialects.routes() if route.body}, *parts()]


def parts():
    return [part for dialect in dialects.DIALECTS for part in dialect.parts]


def test_every_body_is_tried():
    assert set(LEAST) == set(bodies())


@pytest.mark.parametrize("body", LEAST, ids=lambda body: body.__name__)
def test_fields(body):
    least = LEAST[body]
    body.model_validate(least)
    for name in body.HARMLESS:
        body.model_validate({**least, name: "anything"})
        assert name not in body.honoured()
    for name, refusal in body.REFUSED.items():
        assert name not in body.honoured()
        for idle in (None, *refusal.idle):
            body.model_validate({**least, name: idle})
        with pytest.raises(ValidationError, match=f"{name}: expected"):
            body.model_validate({**least, name: {"some": "thing"}})
    with pytest.raises(ValidationError, match="not a field of"):
        body.model_validate({**least, "no_such_field": 1})


@pytest.mark.parametrize(
    "body",
    [
        openai.ChatCompletion,
        openai.RawCompletion,
        tgi.Parameters,
        ollama.OllamaChat,
        ollama.OllamaGenerate,
        ollama.Options,
    ],
    ids=lambda body: body.__name__,
)
def test_every_honoured_field_changes_what_is_asked(body):
    def asked(**fields) -> Asked:
        if body is tgi.Parameters:
            return tgi.Generate.model_validate({"inputs": "hi", "parameters": fields}).asked
        if body is ollama.Options:
            return ollama.OllamaGenerate.model_validate({"prompt": "hi", "options": fields}).asked
        return body.model_validate({**LEAST[body], **fields}).asked

    plain = asked()
    for name in body.honoured():
        if name in SHOWN | QUESTION:
            continue
        value = EFFECTS[name]
        if name == "logprobs" and body is openai.RawCompletion:
            value = 2
        assert asked(**{name: value}) != plain, name


def test_fields_that_were_ignored_once_are_not():
    """What a review found: each of these had no effect and no error."""
    chat = {
        "functions": [{}],
        "function_call": {"name": "x"},
        "guided_json": {},
        "grammar": "root ::= x",
        "best_of": 2,
        "echo": True,
        "continue_final_message": True,
        "add_generation_prompt": False,
        "chat_template_kwargs": {"a": 1},
        "reasoning_effort": "high",
        "modalities": ["audio"],
        "stop_token_ids": [1],
        "min_tokens": 3,
        "ignore_eos": True,
        "temprature": 0,
    }
    for name, value in chat.items():
        with pytest.raises(ValidationError, match=name):
            openai.ChatCompletion.model_validate({"messages": [USER], name: value})
    for name in ("tool_calls", "name"):
        with pytest.raises(ValidationError, match=name):
            openai.ChatMessage.model_validate({**USER, name: [{}]})
    with pytest.raises(ValidationError, match="add_special_tokens"):
        tgi.Parameters.model_validate({"add_special_tokens": False})
    with pytest.raises(ValidationError, match="stream"):
        tgi.Generate.model_validate({"inputs": "x", "stream": True})
    asked = tgi.Generate.model_validate({"inputs": "x", "parameters": {"stop_sequences": ["x"]}})
    assert asked.asked.stops == ("x",)


def test_messages_of_official_clients_are_taken_as_they_come_back():
    """The answer's message is sent again with the next turn, its empty fields too."""
    answer = {"role": "assistant", "content": "Hm.", "refusal": None, "annotations": []}
    answer |= {"audio": None, "function_call": None, "tool_calls": None}
    body = {"messages": [USER, answer, {"role": "developer", "content": "x"}, USER]}
    asked = openai.ChatCompletion.model_validate(body).asked
    assert [turn.role for turn in asked.turns] == ["user", "assistant", "system", "user"]


def test_forms_of_prompts():
    def form(*messages):
        return openai.ChatCompletion.model_validate({"messages": messages}).asked.form

    said = {"role": "assistant", "content": "Hm."}
    system = {"role": "system", "content": "x"}
    assert form(USER) == "chat"
    assert form(system, USER) == "system"
    assert form(system, USER, said, USER) == "turns"
    assert form(USER, said) == "prefill"
    raw = tgi.Generate.model_validate({"inputs": "x"}).asked
    assert raw.form == "raw"
    assert replace(raw, prompt="").form == "raw"


def test_the_docs_have_the_table():
    assert dialects.markdown() == (ROOT / "docs" / "dialects.md").read_text(), "make schema"
