"""Converters: every pair of formats, what is lost, and each tool's own arithmetic on a model."""

from __future__ import annotations

import json
import pickle
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFWriter
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import artifacts
import helpers
from artifacts import ALWAYS, LOW, SAMPLES, asked, mlp, sample, vector, written
from helpers import FACTS, head, package, reading, rule
from steerbridge import gguf_file, load
from steerbridge.cli.app import app
from steerbridge.errors import (
    ConversionError,
    NotRepresentable,
    PackageError,
    SteerbridgeError,
    Unanswered,
    UnknownFormat,
    UnreadableSource,
    WouldLose,
)
from steerbridge.formats import detect, formats, named
from steerbridge.package import SteeringPackage
from steerbridge.tensors import Tensor
from steerbridge_convert import convert
from steerbridge_convert import read as read_artifact
from steerbridge_convert.table import table

torch = pytest.importorskip("torch", reason="needs the extra `convert`")
pytest.importorskip("transformers", reason="needs the extra `hf`")

from steerbridge_hf import steer  # noqa: E402
from steerbridge_hf.sites import facts  # noqa: E402

DOCS = Path(__file__).resolve().parent.parent / "docs"
NAMES = sorted(SAMPLES)
IDS = torch.tensor([[5, 9, 13, 21, 8]])
VECTORS = ["control-vector", "repeng", "easysteer", "steering-vectors", "easyedit", "hotwire"]


@pytest.fixture(scope="module")
def model():
    """A random model whose output embedding is its own."""
    return helpers.tiny()


@pytest.fixture(scope="module")
def tiny(model):
    return facts(model)


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tiny, weights, tmp_path_factory):
    """The artifact of each format."""
    folder = tmp_path_factory.mktemp("artifacts")
    return {name: written(name, folder, weights, tiny) for name in NAMES}


def read(name, path, weights, **answers):
    """The artifact of a format as a package."""
    target = Path(str(path) + ".read")
    given = {**SAMPLES[name].read, **answers}
    convert(path, target, source_format=name, answers=given, base=weights, model=weights)
    return load(target)


@torch.no_grad()
def logits(model, found=None):
    if found is None:
        return model(IDS).logits[0]
    with steer(model, found, ignore=("model_type",)):
        return model(IDS).logits[0]


def assert_alike(got, want, tolerance=1e-5):
    assert (got - want).abs().max() <= tolerance * want.abs().max()


# ------------------------------------------------------------ formats as such


def test_every_format_has_a_sample_and_a_row_in_the_docs():
    assert sorted(formats()) == NAMES
    assert table() in (DOCS / "formats.md").read_text("utf-8")


@pytest.mark.parametrize("name", [n for n in NAMES if n != "cast"])
def test_a_format_knows_its_own_files_alone(name, made):
    assert detect(made[name]).name == name


@pytest.mark.parametrize("name", NAMES)
def test_contents_are_shown_without_answers(name, made):
    assert json.dumps(named(name).contents(made[name]), allow_nan=False)


@pytest.mark.parametrize("name", [n for n in NAMES if formats()[n].exact and n != "cast"])
def test_exact_formats_give_back_every_bit(name, made, weights, tmp_path):
    first = read(name, made[name], weights)
    again = tmp_path / made[name].name
    convert(
        Path(str(made[name]) + ".read"), again, to=name, answers=SAMPLES[name].write, model=weights
    )
    second = read(name, again, weights)
    assert first.tensors == second.tensors
    assert first.spec.interventions == second.spec.interventions
    assert first.spec.rules == second.spec.rules
    assert first.spec.probes == second.spec.probes


@pytest.mark.parametrize("source", NAMES)
def test_every_pair_converts_or_says_why_not(source, made, weights, tmp_path):
    held = sample(source).spec
    for target in NAMES:
        path = tmp_path / f"{target}.{SAMPLES[target].name}{SAMPLES[target].suffix}"
        options = {
            "to": target,
            "source_format": source,
            "answers": asked(source, target),
            "base": weights,
            "model": weights,
        }
        status, error = attempt(made[source], path, options)
        if status == "lossy":
            report = convert(made[source], path, **options, allow_loss=True)
            assert report.losses == error.losses
        elif status == "ok":
            holds = formats()[target].holds
            assert {p.type for p in held.probes} <= holds.probes
            assert {x.type for x in held.interventions} <= holds.interventions
        assert path.exists() == (status != "impossible")


def attempt(source, path, options):
    """How a conversion ends, and why; nothing is written unless it is ok."""
    try:
        assert not convert(source, path, **options).losses
    except WouldLose as error:
        assert not path.exists()
        return "lossy", error
    except NotRepresentable as error:
        return "impossible", error
    return "ok", None


# ------------------------------------------------------------ what is lost


def test_losses_are_said_in_words_and_refused(tmp_path, tiny):
    both = package(
        tiny,
        probes=[helpers.linear_probe()],
        interventions=[head(), {**vector("layer_output[2]"), "position": "from_prompt_end"}],
        rules=[rule(["p"], ["h", "v"])],
    )
    both.save(tmp_path / "guard.gguf")
    with pytest.raises(WouldLose) as caught:
        convert(tmp_path / "guard.gguf", tmp_path / "v.gguf", to="control-vector")
    said = [str(loss) for loss in caught.value.losses]
    assert said == [
        "probe p (linear): is dropped",
        "intervention h (head_matrix): is dropped: it will never act",
        "intervention v: acts on the tokens of the prompt too, not only from its end on",
        "rule r: is dropped: v will act on every prompt",
    ]
    assert not (tmp_path / "v.gguf").exists()
    report = convert(
        tmp_path / "guard.gguf", tmp_path / "v.gguf", to="control-vector", allow_loss=True
    )
    assert [str(loss) for loss in report.losses] == said


def test_a_score_that_sets_the_strength_is_a_loss(tmp_path, tiny):
    follows = package(
        tiny,
        interventions=[vector("layer_output[2]") | {"position": "from_prompt_end"}],
        rules=[rule(["p"], ["v"], strength={"type": "score", "probe": "p", "scale": 2.0})],
    )
    follows.save(tmp_path / "p.gguf")
    with pytest.raises(WouldLose, match="follows no score: v will act at full strength"):
        convert(tmp_path / "p.gguf", tmp_path / "v.gguf", to="repeng")


def test_a_second_prober_is_a_loss(tmp_path, tiny):
    second = {**mlp(artifacts.AT_OFFSET), "id": "q"}
    package(tiny, free=64, probes=[mlp(artifacts.AT_OFFSET), second]).save(tmp_path / "two")
    answers = SAMPLES["autosteer"].write
    with pytest.raises(WouldLose, match=r"probe q \(mlp\): is dropped: one prober is held"):
        convert(tmp_path / "two", tmp_path / "out", to="autosteer", answers=answers)
    package(
        tiny, free=64, probes=[mlp(artifacts.AT_OFFSET), second], rules=[rule(["p", "q"], ["h"])]
    ).save(tmp_path / "any")
    with pytest.raises(NotRepresentable, match="a rule of 2 probes"):
        convert(tmp_path / "any", tmp_path / "out", to="autosteer", answers=answers)


def test_a_threshold_that_no_bias_can_say(tmp_path, tiny):
    certain = helpers.linear_probe(link="sigmoid", threshold=1.0, comparator=">=")
    package(tiny, probes=[certain]).save(tmp_path / "p")
    with pytest.raises(NotRepresentable, match=r"a threshold of 1.0 on a probability"):
        convert(tmp_path / "p", tmp_path / "q", to="probe-aisteer360", allow_loss=True)


def test_nothing_left_is_no_conversion(tmp_path, tiny):
    package(tiny).save(tmp_path / "head.gguf")
    with pytest.raises(NotRepresentable, match=r"no part of this package: p \(linear\), h"):
        convert(tmp_path / "head.gguf", tmp_path / "v.gguf", to="repeng", allow_loss=True)


def test_block_0_is_dropped_for_llama_cpp_and_only_if_allowed(tmp_path, made, weights):
    options = {"to": "control-vector", "answers": {"strength": "1"}, "base": weights}
    with pytest.raises(WouldLose, match="the vector after block 0: is dropped"):
        convert(made["repeng"], tmp_path / "v.gguf", **options)
    convert(made["repeng"], tmp_path / "v.gguf", **options, allow_loss=True)
    assert set(gguf_file.read(tmp_path / "v.gguf").tensors) == {"direction.2"}


# ------------------------------------------------------------ what must be said


def test_nothing_is_guessed(tmp_path, made, weights):
    with pytest.raises(Unanswered, match="strength is not in the files"):
        convert(made["repeng"], tmp_path / "a", base=weights)
    with pytest.raises(Unanswered, match="base is not in the files"):
        convert(made["repeng"], tmp_path / "a", answers={"strength": "1"})
    with pytest.raises(Unanswered, match="eps is not in the files"):
        convert(made["autosteer"], tmp_path / "a", base=weights)
    with pytest.raises(Unanswered, match="found 'one'"):
        convert(made["repeng"], tmp_path / "a", answers={"strength": "one"}, base=weights)
    with pytest.raises(Unanswered, match="nothing asks for it"):
        convert(made["repeng"], tmp_path / "a", answers={"polarity": "up"}, base=weights)
    assert not (tmp_path / "a").exists()


def test_a_file_for_another_model_is_refused(tmp_path, made):
    other = package(helpers.ModelFacts("qwen2", 16, 4, 64, name="other")).save(
        tmp_path / "base.gguf"
    )
    with pytest.raises(NotRepresentable, match="not made for other: model_type"):
        convert(made["repeng"], tmp_path / "a", answers={"strength": "1"}, base=other)
    narrow = package(helpers.ModelFacts("llama", 8, 4, 64, name="narrow")).save(tmp_path / "n.gguf")
    with pytest.raises(NotRepresentable, match="width 8"):
        convert(made["repeng"], tmp_path / "a", answers={"strength": "1"}, base=narrow)


def test_unknown_formats_and_files(tmp_path, made):
    with pytest.raises(UnknownFormat, match="no format is called 'x'"):
        convert(made["repeng"], tmp_path / "a", to="x")
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "none", tmp_path / "a")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UnknownFormat, match="of no known format"):
        convert(tmp_path / "notes.txt", tmp_path / "a")
    with pytest.raises(PackageError, match="exists and is no"):
        convert(made["steerbridge"], tmp_path / "notes.txt", to="steerbridge-gguf")


# ------------------------------------------------------------ hostile and broken files


class _Bomb:
    def __reduce__(self):
        import os

        return os.system, ("touch PWNED",)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")  # torch, of the raw pickle
@pytest.mark.parametrize("name", ["steering-vectors", "hotwire", "lm-steer"])
def test_a_hostile_pickle_runs_nothing(name, tmp_path, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "lm_steer_vector.pt"
    bombs = {
        "zip": lambda: torch.save({"layer_activations": _Bomb(), "projector1": 1}, path),
        "raw": lambda: path.write_bytes(pickle.dumps(_Bomb())),
        "list": lambda: torch.save([_Bomb(), {}, 0], path),
    }
    for make in bombs.values():
        make()
        with pytest.raises(UnreadableSource, match="plain containers"):
            convert(
                path,
                tmp_path / "out",
                source_format=name,
                answers=SAMPLES[name].read,
                base=weights,
            )
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("steerbridge", "steerbridge-gguf")])
def test_truncated_files_are_one_clear_error(name, made, tmp_path, weights):
    source = made[name]
    files = [source] if source.is_file() else [p for p in source.rglob("*") if p.is_file()]
    for file in files:
        copy = tmp_path / "copy" / source.name
        if source.is_dir():
            import shutil

            shutil.copytree(source, copy, dirs_exist_ok=True)
            broken = copy / file.relative_to(source)
        else:
            copy.parent.mkdir(exist_ok=True)
            broken = copy
        whole = file.read_bytes()
        for size in (0, 3, len(whole) // 2, len(whole) - 1):
            broken.write_bytes(whole[:size])
            if file.suffix == ".json" and size == len(whole) - 1:
                continue  # but for a line feed it is whole
            with pytest.raises(ConversionError):
                convert(
                    copy,
                    tmp_path / "out",
                    source_format=name,
                    answers=SAMPLES[name].read,
                    base=weights,
                    model=weights,
                )
        broken.write_bytes(whole)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"direction.1": np.array([1, np.nan], "f4")}, "finite values"),
        ({"direction.1": np.ones((2, 2), "f4")}, "one dimension"),
        ({"direction.1": np.ones(2, "f4"), "other": np.ones(2, "f4")}, "direction.N"),
        ({"direction.-1": np.ones(2, "f4")}, "direction.N"),
        ({}, "found none"),
    ],
)
def test_broken_directions(tensors, match, tmp_path, weights):
    path = tmp_path / "v.gguf"

    def fill(writer: GGUFWriter) -> None:
        for name, values in tensors.items():
            writer.add_tensor(name, values)

    gguf_file.write(path, "controlvector", fill)
    with pytest.raises(UnreadableSource, match=match):
        convert(path, tmp_path / "a", answers={"strength": "1"}, base=weights)


# ------------------------------------------------------------ each tool's arithmetic


def hooked(model, changes, side):
    """Logits with vectors added at the outputs (or inputs) of blocks, as the tools do it."""
    handles = []
    for k, values in changes.items():
        block = model.model.layers[k]
        v = torch.from_numpy(np.array(values))
        if side == "output":
            handles.append(
                block.register_forward_hook(
                    lambda m, a, out, v=v: out[0] + v if isinstance(out, tuple) else out + v
                )
            )
        else:
            handles.append(block.register_forward_pre_hook(lambda m, a, v=v: (a[0] + v, *a[1:])))
    try:
        return logits(model)
    finally:
        for handle in handles:
            handle.remove()


def raw_vectors(name, path):
    """What the tool itself would read from its file, by key."""
    if name in ("control-vector", "repeng", "easysteer"):
        from gguf import GGUFReader

        return {int(t.name.split(".")[1]): np.array(t.data) for t in GGUFReader(path).tensors}
    if name.startswith("svec"):
        found = json.loads(path.read_text())["directions"]
        return {int(k): np.array(v, "f4").reshape(-1) for k, v in found.items()}
    if name == "easyedit":
        return {int(p.stem[6:]): torch.load(p).numpy() for p in path.glob("layer_*.pt")}
    found = torch.load(path)
    if name == "hotwire":
        return {k: found[k].numpy() for k in (1, 2)}
    return {k: v.numpy() for k, v in found["layer_activations"].items()}


@pytest.mark.parametrize(
    ("name", "side"),
    [(n, "output") for n in VECTORS] + [("svec-ibm", "input"), ("svec-aisteer360", "input")],
)
def test_vectors_change_the_logits_as_their_tool_does(name, side, made, weights, model):
    want = hooked(model, raw_vectors(name, made[name]), side)
    assert (want - logits(model)).abs().max() > 0.1
    assert_alike(logits(model, read(name, made[name], weights)), want)
    twice = hooked(model, {k: 2 * v for k, v in raw_vectors(name, made[name]).items()}, side)
    Path(str(made[name]) + ".read").rename(Path(str(made[name]) + ".once"))
    assert_alike(logits(model, read(name, made[name], weights, strength="2")), twice)


def test_steerkit_s_direction_and_alpha(made, weights, model):
    from safetensors import safe_open

    with safe_open(made["steerkit"], "numpy") as file:
        metadata, values = file.metadata(), file.get_tensor("direction.mass_mean")
    assert abs(np.linalg.norm(values) - 1) < 1e-6
    assert metadata["hook_name"] == "blocks.2.hook_resid_post"
    want = hooked(model, {2: float(metadata["auto_alpha"]) * values}, "output")
    assert_alike(logits(model, read("steerkit", made["steerkit"], weights)), want)


@torch.no_grad()
def head_inputs(model):
    return model.model(IDS).last_hidden_state[0]


def test_lm_steer_s_projectors(made, weights, model):
    _, pair, _ = torch.load(made["lm-steer"])
    h = head_inputs(model)
    moved = h + 0.5 * (h @ pair["projector1"][0]) @ pair["projector2"][0].T
    want = model.lm_head(moved).detach()[-1]
    got = logits(model, read("lm-steer", made["lm-steer"], weights))[-1]
    assert_alike(got, want)


class HyperParams:
    """As EasyEdit pickles one into the list."""

    def __init__(self):
        self.alg_name = "LM-Steer"


def test_lm_steer_s_list_holds_an_object_of_its_tool(made, weights, tmp_path):
    found = torch.load(made["lm-steer"])
    path = tmp_path / "lm_steer_vector.pt"
    torch.save([HyperParams(), *found[1:]], path)
    assert (
        read("lm-steer", path, weights).tensors
        == read("lm-steer", made["lm-steer"], weights).tensors
    )


@pytest.mark.parametrize("name", ["lora-gguf", "peft"])
@pytest.mark.parametrize("form", ["dense", "low"])
def test_a_head_as_lora(name, form, tmp_path, weights, model, tiny):
    """delta = B A on lm_head, read from the file with no code of ours."""
    acts = [head(**({"weight": LOW} if form == "low" else {}))]
    ours = package(tiny, probes=[], interventions=acts, rules=[rule(None, ["h"])], scale=0.3)
    ours.save(tmp_path / "head")
    path = tmp_path / f"lora{SAMPLES[name].suffix}"
    convert(tmp_path / "head", path, to=name, model=weights)
    if name == "peft":
        from peft import PeftModel

        adapted = PeftModel.from_pretrained(helpers.tiny(), path)
        with torch.no_grad():
            want = adapted(IDS).logits[0, -1]
    else:
        from gguf import GGUFReader

        a, b = (torch.from_numpy(np.array(t.data)) for t in GGUFReader(path).tensors)
        h = head_inputs(model)[-1]
        want = model.lm_head(h).detach() + b @ (a @ h)
    assert_alike(logits(model, ours)[-1], want)
    assert_alike(logits(model, read(name, path, weights))[-1], want, 1e-4)


def test_what_peft_saves_is_read(tmp_path, model, weights):
    """An adapter trained elsewhere: with rsLoRA, and with the base head that PEFT adds."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["lm_head"], use_rslora=True, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(helpers.tiny(), config)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(p, std=0.2)
        # B in the span of E: what a head matrix can say.
        e = adapted.base_model.model.lm_head.base_layer.weight
        adapted.base_model.model.lm_head.lora_B["default"].weight.copy_(e @ torch.randn(16, 4))
        want = adapted(IDS).logits[0, -1]
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        adapted.save_pretrained(tmp_path / "adapter")
    got = logits(model, read("peft", tmp_path / "adapter", weights))[-1]
    assert_alike(got, want, 1e-4)


def test_a_change_outside_the_span_is_a_loss(tmp_path, weights, tiny, made):
    import shutil

    from safetensors.numpy import load_file, save_file

    shutil.copytree(made["peft"], tmp_path / "odd")
    file = tmp_path / "odd" / "adapter_model.safetensors"
    found = load_file(file)
    key = next(k for k in found if "lora_B" in k)
    found[key] = np.random.default_rng(0).normal(size=found[key].shape).astype("f4")
    save_file(found, file)
    with pytest.raises(WouldLose, match=r"is no E U: lost"):
        convert(tmp_path / "odd", tmp_path / "out", model=weights)


def test_tied_models_take_no_lora(tmp_path, tiny):
    tied = helpers.tiny(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    sample("peft", tiny).save(tmp_path / "head")
    for name in ("peft", "lora-gguf"):
        with pytest.raises(NotRepresentable, match=r"shares model.embed_tokens.weight"):
            convert(tmp_path / "head", tmp_path / "lora.gguf", to=name, model=tmp_path / "tied")


@torch.no_grad()
def test_autosteer_s_prober_and_matrix(made, weights, model):
    """E (h + eps S h) where softmax(prober)[0] > 0.5, with the authors' file alone."""
    path = made["autosteer"]
    matrix = torch.load(path / "Epoch_0.pt")
    state = torch.load(path / "layer2" / "epoch_0.pt")
    net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
    net.load_state_dict({k.removeprefix("layers."): v for k, v in state.items()})
    for seed in range(6):
        ids = torch.randint(3, 64, (1, 6), generator=torch.Generator().manual_seed(seed))
        hidden = model(ids, output_hidden_states=True).hidden_states
        toxic = net(hidden[2][0, -2]).softmax(-1)[0]
        h = model.model(ids).last_hidden_state[0, -1]
        want = model.lm_head(h + 0.5 * matrix @ h if toxic > 0.5 else h)
        with steer(model, _once(made, weights)) as session:
            got = model(ids).logits[0, -1]
            assert abs(session.outcomes[0].verdicts[0].score - float(toxic)) < 1e-5
        assert_alike(got, want)


def _once(made, weights):
    target = Path(str(made["autosteer"]) + ".read")
    return load(target) if target.exists() else read("autosteer", made["autosteer"], weights)


@pytest.mark.parametrize("harmful", ["bad", "good"])
@pytest.mark.parametrize("name", ["autosteer", "safeswitch"])
def test_class_orders_thresholds_and_scales_are_converted(name, harmful, tmp_path, weights, tiny):
    """The decision stays with the classes the other way round, another threshold, normalised."""
    at = artifacts.AT_OFFSET if name == "autosteer" else reading("head_input")
    output = {"type": "softmax", "classes": ["bad", "good"], "harmful": harmful}
    probe = mlp(at, output=output, threshold=0.3, input_mean="m", input_scale="s", comparator=">")
    ours = package(tiny, free=64, probes=[probe])
    ours.save(tmp_path / "ours")
    convert(
        tmp_path / "ours",
        tmp_path / "theirs",
        to=name,
        answers=SAMPLES[name].write,
        model=weights,
        allow_loss=name == "safeswitch",
    )
    theirs = read(name, tmp_path / "theirs", weights)
    from steerbridge import reference

    x = np.random.default_rng(1).normal(size=(500, 16)) * 2
    before = reference.score(ours.spec.probes[0], ours.tensors, x) > 0.3
    after = reference.score(theirs.spec.probes[0], theirs.tensors, x) > 0.5
    assert 50 < before.sum() < 450
    assert (before == after).all()


@torch.no_grad()
def test_safeswitch_s_head_replaces_the_embedding(made, weights, model):
    new = torch.load(made["safeswitch"] / "refusal_head.pth")
    found = read("safeswitch", made["safeswitch"], weights)
    h = head_inputs(model)[-1]
    fired = found.spec.model_copy(
        update={
            "probes": tuple(p.model_copy(update={"threshold": -1.0}) for p in found.spec.probes)
        }
    )
    got = logits(model, SteeringPackage(fired, found.tensors))[-1]
    assert_alike(got, new @ h, 1e-4)


@torch.no_grad()
def test_aisteer360_s_probe(made, weights, model):
    """sum of w . mean(x) over layers, plus the bias, at 0 and above."""
    from safetensors.torch import load_file

    path = made["probe-aisteer360"]
    info = json.loads((path / "probe.json").read_text())
    weight = load_file(path / "probe.safetensors")
    hidden = model(IDS, output_hidden_states=True).hidden_states
    want = info["bias"] + sum(
        float(weight[f"weights.{k}"] @ hidden[k][0].mean(0)) for k in info["weight_layer_ids"]
    )
    with steer(model, read("probe-aisteer360", path, weights)) as session:
        model(IDS)
    verdict = session.outcomes[0].verdicts[0]
    assert abs(verdict.score - want) < 1e-4 * abs(want)
    assert verdict.fired == (want >= 0)


@torch.no_grad()
def test_cast_s_condition_and_behaviour(made, weights, model, tmp_path):
    """cos(h, tanh(P h)) of the mean input of block 2; what acts is IBM's vector behind it."""
    c = torch.tensor(json.loads(made["cast"].read_text())["directions"]["2"])
    h = model(IDS, output_hidden_states=True).hidden_states[2][0].mean(0)
    want = torch.nn.functional.cosine_similarity(h, torch.tanh((h @ c) / (c @ c) * c), dim=0)
    answers = {
        **SAMPLES["cast"].read,
        "threshold": str(float(want) - 1e-3),
        "behaviour": str(made["svec-ibm"]),
        "strength": "2",
    }
    options = {"source_format": "cast", "base": weights}
    with pytest.raises(WouldLose, match="changes the prompt's own tokens too"):
        convert(made["cast"], tmp_path / "cast", answers=answers, **options)
    convert(made["cast"], tmp_path / "cast", answers=answers, allow_loss=True, **options)
    with steer(model, load(tmp_path / "cast")) as session:
        got = model(IDS).logits[0]
    assert abs(session.outcomes[0].verdicts[0].score - float(want)) < 1e-5
    assert session.outcomes[0].fired
    assert torch.equal(got[:-1], logits(model)[:-1])  # the prompt's own tokens are left alone
    assert (got[-1] - logits(model)[-1]).abs().max() > 0.1
    with pytest.raises(Unanswered, match="strength"):
        convert(made["cast"], tmp_path / "x", answers={**answers, "strength": "0"}, **options)


# ------------------------------------------------------------ smaller packages


def test_rank_and_energy(tmp_path, tiny):
    ours = sample("steerbridge", tiny)
    ours.save(tmp_path / "dense")
    report = convert(tmp_path / "dense", tmp_path / "low.gguf", rank=4)
    matrix = ours.tensors["h.W"].float32()
    low = load(tmp_path / "low.gguf")
    approximated = low.tensors["h.u"].float32() @ low.tensors["h.v"].float32()
    error = np.linalg.norm(matrix - approximated) / np.linalg.norm(matrix)
    assert report.truncations[0].rank == 4
    assert abs(report.truncations[0].error - error) < 1e-5
    kept = convert(tmp_path / "dense", tmp_path / "most.gguf", energy=0.9).truncations[0]
    values = np.linalg.svd(matrix, compute_uv=False) ** 2
    assert values[: kept.rank].sum() >= 0.9 * values.sum() > values[: kept.rank - 1].sum()
    again = convert(tmp_path / "low.gguf", tmp_path / "same.gguf", rank=4).truncations[0]
    assert again.error < 1e-6
    for wrong in ({"rank": 0}, {"rank": 17}, {"energy": 0.0}, {"rank": 2, "energy": 0.5}):
        with pytest.raises(ConversionError):
            convert(tmp_path / "dense", tmp_path / "x.gguf", **wrong)


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F32"])
def test_dtypes(dtype, tmp_path, tiny):
    ours = sample("steerbridge", tiny)
    ours.save(tmp_path / "p")
    convert(tmp_path / "p", tmp_path / "q.gguf", dtype=dtype)
    for name, tensor in load(tmp_path / "q.gguf").tensors.items():
        assert tensor.dtype == dtype
        assert np.allclose(tensor.float32(), ours.tensors[name].float32(), rtol=1e-2, atol=1e-2)


# ------------------------------------------------------------ the tools themselves


PEERS = Path(__file__).resolve().parent.parent / ".venv-peers" / "bin" / "python"


@pytest.mark.skipif(not PEERS.is_file(), reason="needs .venv-peers (make setup-peers)")
def test_the_tools_read_ours_and_we_read_theirs(tmp_path, made, weights, model):
    """repeng, steering-vectors and hotwire in their own environment, on the same model."""
    script = Path(__file__).parent / "peers.py"
    paths = {n: str(made[n]) for n in ("repeng", "control-vector", "steering-vectors", "hotwire")}
    job = {"model": str(weights), "artifacts": paths, "ids": IDS.tolist(), "out": str(tmp_path)}
    subprocess.run([PEERS, script, json.dumps(job)], check=True, timeout=300)
    found = np.load(tmp_path / "logits.npz")
    plain = logits(model)
    assert_alike(torch.from_numpy(found["plain"]), plain)
    for name in ("repeng", "control-vector", "steering-vectors", "hotwire"):
        ours = logits(model, read(name, made[name], weights))
        assert (ours - plain).abs().max() > 0.1
        assert_alike(torch.from_numpy(found[name]), ours)
    theirs = {"repeng": "theirs.gguf", "steering-vectors": "theirs.pt"}
    for name, file in theirs.items():
        ours = logits(model, read(name, tmp_path / file, weights))
        assert_alike(ours, torch.from_numpy(found[f"{name} theirs"]))


# ------------------------------------------------------------ properties and the command line


@settings(max_examples=25, deadline=None)
@given(
    st.dictionaries(
        st.integers(1, 3),
        st.lists(
            st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=16, max_size=16
        ),
        min_size=1,
    ),
    st.sampled_from(
        ["control-vector", "repeng", "svec-aisteer360", "steering-vectors", "easyedit"]
    ),
)
def test_any_vector_comes_back_bit_for_bit(values, name):
    places = [f"layer_output[{k}]" for k in values]
    plain = package(FACTS, **{**ALWAYS, "interventions": [vector(*places)]})
    tensors = {f"v{i}": Tensor.of(np.array(v)) for i, v in enumerate(values.values())}
    answers = {"strength": "1", "applied_at": "layer_output"}
    asks = {a.name for a in named(name).asks}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        SteeringPackage(plain.spec, tensors).save(root / "p")
        artifact = root / f"artifact{SAMPLES[name].suffix}"
        convert(
            root / "p",
            artifact,
            to=name,
            answers={a.name: answers[a.name] for a in named(name).write_asks},
        )
        found, lost = read_artifact(
            artifact,
            source_format=name,
            answers={k: v for k, v in answers.items() if k in asks},
            base=FACTS.info(),
        )
        assert not lost
        got = {
            t.site.layer: found.tensors[t.vector].float32().tobytes()
            for t in found.spec.interventions[0].targets
        }
    assert got == {k: np.array(v, np.float32).tobytes() for k, v in values.items()}


def run(*arguments):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_the_command_line(tmp_path, made, weights):
    done = run(
        "convert", made["repeng"], tmp_path / "p.gguf", "--base", weights, "--set", "strength=4",
        "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["target"] == "steerbridge-gguf"
    assert load(tmp_path / "p.gguf").spec.interventions[0].alpha == 4
    lossy = (
        "convert",
        made["steerbridge"],
        tmp_path / "l.pt",
        "--to",
        "lm-steer",
        "--base",
        weights,
    )
    refused = run(*lossy)
    assert isinstance(refused.exception, WouldLose)
    written = run(*lossy, "--allow-loss")
    assert "lost       rule r: is dropped: h will act on every prompt" in written.stdout
    cut = run("convert", made["steerbridge"], tmp_path / "low.gguf", "--rank", 2)
    assert "rank       h: 2, relative error" in cut.stdout
    (tmp_path / "l.pt").rename(tmp_path / "renamed.pt")  # known by its content
    assert detect(tmp_path / "renamed.pt").name == "lm-steer"
    torch.save({"weights": 1}, tmp_path / "other.pt")
    assert isinstance(run("inspect", tmp_path / "other.pt").exception, UnknownFormat)
    assert "strength of the matrix" in run("formats").stdout
    assert set(json.loads(run("formats", "--json").stdout)) == set(NAMES)
    for wrong in (("--set", "x"), ("--dtype", "F64"), ("--data", made["cast"])):
        assert isinstance(
            run("convert", made["steerbridge"], tmp_path / "no", *wrong).exception, SteerbridgeError
        )


@pytest.mark.parametrize("name", [n for n in NAMES if n != "cast"])
def test_inspect_reads_every_format(name, made):
    shown = run("inspect", made[name])
    assert shown.exit_code == 0, shown.output
    assert (formats()[name].title in shown.stdout) or name.startswith("steerbridge")
    assert json.loads(run("inspect", made[name], "--json").stdout)
