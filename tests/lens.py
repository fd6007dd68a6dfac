"""Runs in .venv-lens: steerkit and SAELens apply our artifacts and write some of their own, on a
model in TransformerLens.

`python lens.py JOB`: JOB is a JSON object with the model directory, artifacts by format, token ids
and an output directory. Writes `logits.npz`, `theirs.probe.safetensors` and the directory `theirs`.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE, StandardSAE, StandardSAEConfig
from sae_lens.saes.sae import SAEMetadata
from steerkit.intervention import make_hook
from steerkit.probe import Probe
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

FEATURE, STRENGTH = 3, 2.5


@torch.no_grad()
def main() -> None:
    job = json.loads(sys.argv[1])
    ids, out = torch.tensor(job["ids"]), Path(job["out"])
    bridge, model = bridged(job["model"])
    logits = {"plain": model(ids).logits}
    rng = torch.Generator().manual_seed(0)
    width = model.config.hidden_size

    def steered(hook: str, change: object) -> torch.Tensor:
        return bridge.run_with_hooks(ids, fwd_hooks=[(hook, change)])

    mine = Probe(
        directions={
            "mass_mean": torch.nn.functional.normalize(torch.randn(width, generator=rng), dim=0)
        },
        bias={"mass_mean": 0.0},
        layer=1,
        metrics={},
        model_id="tiny",
        hook_site="resid_pre",
        hook_name="blocks.1.hook_resid_pre",
        n_total_layers=model.config.num_hidden_layers,
        default_method="mass_mean",
        auto_alpha=3.5,
    )
    mine.save(out / "theirs.probe.safetensors")
    for name, probe in (
        ("steerkit", Probe.load(job["artifacts"]["steerkit"])),
        ("steerkit theirs", mine),
    ):
        # As in `Probe.steer`, whose defaults are addition and the calibrated alpha.
        change = make_hook("addition", probe.get_direction(), alpha=probe.auto_alpha)
        logits[name] = steered(probe.hook_name, change)

    about = SAEMetadata(hook_name="blocks.2.hook_resid_pre", model_name="tiny")
    own = StandardSAE(StandardSAEConfig(d_in=width, d_sae=8, metadata=about))
    own.W_dec.data = torch.randn(8, width, generator=rng)
    own.save_model(out / "theirs")
    for name, sae in (
        ("sae-lens", SAE.load_from_disk(job["artifacts"]["sae-lens"])),
        ("sae-lens theirs", own),
    ):
        # As in the tutorial on steering: the feature's row, times a strength, at the SAE's hook.
        row = STRENGTH * sae.W_dec[FEATURE]
        hook = sae.cfg.metadata.hook_name
        logits[name] = steered(hook, lambda states, hook, row=row: states + row)
    np.savez(out / "logits.npz", **{name: value[0].numpy() for name, value in logits.items()})


def bridged(folder: str) -> tuple[TransformerBridge, torch.nn.Module]:
    """The model in TransformerLens, which wants a tokenizer beside it, and as it is."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="w0")),
        unk_token="w0",
        bos_token="w1",
        eos_token="w2",
        pad_token="w0",
    ).save_pretrained(folder)
    return TransformerBridge.boot_transformers(folder, hf_model=model), model


main()
