"""Which language models compose exactly: try a tiny random model of every causal-LM type that transformers knows.

`python scripts/sweep_language_models.py` writes docs/language-models/sweep.json and the table of
docs/language-models.md. What `compose` does not refuse must pass every check of `check_model`; otherwise the script
ends with an error, because such a model would be silently wrong.
"""

import argparse
import json
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Tokenizer, PreTrainedConfig, set_seed
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from imageprompt import compose
from imageprompt.provenance import provenance

DOCS = Path(__file__).parents[1] / "docs"
PAGE, RESULTS = DOCS / "language-models.md", DOCS / "language-models" / "sweep.json"
TABLE = ("<!-- table -->\n", "<!-- /table -->")

# Small numbers for whatever a configuration calls its sizes. Windows are shorter than the texts that are tried.
SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embed_dim", "word_embed_proj_dim", "embedding_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 64),
    **dict.fromkeys(("n_inner", "ffn_dim", "d_inner", "d_ff", "decoder_ffn_dim", "encoder_ffn_dim"), 64),
    **dict.fromkeys(("ffn_hidden_size",), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 128),
    **dict.fromkeys(("head_dim", "qk_rope_head_dim", "rotary_dim", "sliding_window", "window_size"), 8),
    **dict.fromkeys(("attention_window",), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), 2),
    # Large enough that a wrong position or image changes the logits.
    **dict.fromkeys(("initializer_range", "init_std"), 0.1),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 400),
}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "v_head_dim": 8}
HYBRID = {"num_hidden_layers": 4}  # one of them attends
OWN_SIZES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "axk1"), LATENT),
    **dict.fromkeys(("dots3_note_text", "glm4_moe_lite", "glm_moe_dsa", "longcat_flash", "minicpm3", "youtu"), LATENT),
    **dict.fromkeys(("lfm3", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next", "qwen4_exp_text"), HYBRID),
    **dict.fromkeys(("bailing_hybrid", "kimi_linear"), HYBRID | LATENT),
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "dots1": {"n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gemma4_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16, "layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32},
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16]},
    "zamba2": {"num_hidden_layers": 54},
    "zaya": {"num_experts_per_tok": 1},
}
# GPT-2 under other sizes, and families that use another family's classes: name, model type, settings.
VARIANTS = {
    "gpt2 (untied)": ("gpt2", {"tie_word_embeddings": False}),
    "gpt2 (attention scaled by layer)": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "llama (smollm, smollm2)": ("llama", {"tie_word_embeddings": True}),
    "opt (word_embed_proj_dim, as opt-350m)": ("opt", {"word_embed_proj_dim": 16}),
    "granite (multipliers, as published)": (
        "granite",
        {"embedding_multiplier": 12.0, "logits_scaling": 8.0, "residual_multiplier": 0.2},
    ),
    "mpt (logit_scale)": ("mpt", {"logit_scale": 0.5}),
    "phi3 (longrope, as the 128k models)": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            },
        },
    ),
}

COLOURS = {name: Image.new("RGB", (70, 90), name) for name in ("red", "green", "blue", "white")}
ROWS = [  # images and text of each row
    (["red"], "A photo of"),
    ([], "What is it? It is the number seven."),
    (["green", "blue", "white"], "<image><image>Two<image> cats"),
]
NEW_TOKENS = 6
LARGEST = 30_000_000  # parameters
LIMIT = 1e-5
VERDICTS = ("exact", "refused", "not tried", "wrong")


def model_types() -> list[str]:
    """Every causal-LM type but our own, and the variants."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *VARIANTS} - {"imageprompt"})


def tiny_config(name: str) -> PreTrainedConfig:
    """The configuration of a tiny model without dropout."""
    model_type, overrides = VARIANTS.get(name, (name, {}))
    known = {field.name: field for field in fields(CONFIG_MAPPING[model_type])}
    settings = {key: value for key, value in SIZES.items() if key in known}
    settings |= {key: 0.0 for key, field in known.items() if "drop" in key and isinstance(field.default, float)}
    settings |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return AutoConfig.for_model(model_type, **settings | OWN_SIZES.get(model_type, {}) | overrides)


def byte_tokenizer() -> GPT2Tokenizer:
    """A token for every byte, and one for the end."""
    words = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return GPT2Tokenizer(tokenizer_object=bpe)


def refusal_or_check(name: str, tokenizer: GPT2Tokenizer) -> dict[str, Any]:
    """What becomes of one type: {"verdict": "exact" | "refused" | "wrong" | "not tried", ...}."""
    set_seed(0)
    try:
        config = tiny_config(name)
        if config.get_text_config(decoder=True) is config:  # others are refused before they are built
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
            if size > LARGEST:
                raise ValueError(f"{size / 1e6:.0f} million parameters are too many")
            AutoModelForCausalLM.from_config(config).eval()(torch.arange(12)[None])
    except Exception as error:  # whatever transformers says: there is no model here that we could try
        return {"verdict": "not tried", "reason": f"No tiny model with the sweep's sizes: {_first_line(error)}"}
    try:
        model, processor = compose(
            "resnet10t",
            config,
            tokenizer=tokenizer,
            pretrained=False,
            num_image_tokens=4,
            preprocessing={"input_size": (3, 64, 64)},
        )
    except ValueError as error:
        return {"verdict": "refused", "reason": _first_line(error)}
    checks = check_model(model, processor)
    wrong = [check for check, difference in checks.items() if not difference <= LIMIT]
    result: dict[str, Any] = {"verdict": "wrong" if wrong else "exact", "checks": checks}
    if wrong:
        result["reason"] = ", ".join(wrong)
    return result


def check_model(model, processor) -> dict[str, float]:
    """Each check's difference from its reference; none may exceed `LIMIT`.

    Differences of logits are relative to the largest logit; the others are 0 or 1.
    """
    for parameter in model.model.connector.parameters():
        torch.nn.init.normal_(parameter)
    inputs = _batch(processor, ROWS)
    alone = [_batch(processor, [row]) for row in ROWS]
    checks = _against_the_language_model(model, processor)
    with torch.no_grad():
        logits = [model(**row).logits[0] for row in alone]
        for side in ("left", "right"):
            batch = _batch(processor, ROWS, padding_side=side)
            together = model(**batch).logits
            checks[f"rows padded on the {side}"] = max(
                _difference(together[row][batch["attention_mask"][row].bool()], logits[row]) for row in range(len(ROWS))
            )
    new = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=-1)
    expected = [_greedy(model, row) for row in alone]
    checks["generation with a cache"] = float(new[:, inputs["input_ids"].shape[1] :].tolist() != expected)

    labels = inputs["input_ids"].where(inputs["attention_mask"].bool(), -100)
    labels = labels.where(labels != model.config.image_token_id, -100)
    model.train()
    model(**inputs, labels=labels).loss.backward()
    gradients = [parameter.grad for parameter in model.model.connector.parameters()]
    reached = all(grad is not None and grad.isfinite().all() and grad.abs().sum() > 0 for grad in gradients)
    checks["gradient of the connector"] = float(not reached)
    model.eval()

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        reloaded = type(model).from_pretrained(folder)
        pairs = [(one.state_dict() | dict(one.named_buffers())) for one in (model, reloaded)]
        kept = pairs[0].keys() == pairs[1].keys() and all(torch.equal(pairs[0][key], pairs[1][key]) for key in pairs[0])
        checks["weights saved and reloaded"] = float(not kept)
        checks["logits of the reloaded model"] = _difference(reloaded(**inputs).logits, model(**inputs).logits)
    checks["ties"] = float(
        any((one.lm_head.weight is one.get_input_embeddings().weight) != _is_tied(model) for one in (model, reloaded))
    )
    return checks


def _against_the_language_model(model, processor) -> dict[str, float]:
    """Plain text beside transformers' own model with the same weights: logits, and the loss in training."""
    reference = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    reference.base_model.load_state_dict(model.model.language_model.state_dict())
    reference.get_output_embeddings().load_state_dict(model.lm_head.state_dict())
    ids = processor(text=ROWS[1][1] * 2, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = _difference(model(ids).logits, reference(ids).logits)
        losses = [one.train()(input_ids=ids, labels=ids).loss for one in (model, reference)]
    model.eval()
    return {"logits of plain text": logits, "loss of plain text": _difference(*losses)}


@torch.no_grad()
def _greedy(model, inputs) -> list[int]:
    """New tokens of one row, without cache, batch or `generate`."""
    ids, new = inputs["input_ids"], []
    for _ in range(NEW_TOKENS):
        logits = model(input_ids=ids, pixel_values=inputs.get("pixel_values"), use_cache=False).logits[0, -1]
        logits[model.generation_config.suppress_tokens] = float("-inf")
        new.append(logits.argmax().item())
        ids = torch.cat([ids, torch.tensor([new[-1:]])], dim=1)
    return new


def _batch(processor, rows, **kwargs):
    images = [[COLOURS[name] for name in names] for names, _ in rows]
    return processor(images=images, text=[text for _, text in rows], padding=True, return_tensors="pt", **kwargs)


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def _is_tied(model) -> bool:
    return bool(getattr(model.config.text_config, "tie_word_embeddings", False))


def _first_line(error: Exception) -> str:
    """The beginning of an error's message, on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else f"{text[:237]}..."


def table(results: dict[str, dict[str, Any]]) -> str:
    """The page's table: the verdict on each type, and why one is refused."""
    lines = ["| language model | verdict | reason |", "| --- | --- | --- |"]
    for name, result in results.items():
        reason = result.get("reason", "").replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| {name} | {result['verdict']} | {reason} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Sweep the types named on the command line, or all; only a sweep of all is written to the docs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*", help="all of transformers' by default, which are then written down")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = byte_tokenizer()
    results = {}
    for name in arguments.model_types or model_types():
        results[name] = refusal_or_check(name, tokenizer)
        print(name, json.dumps(results[name]), flush=True)
    if not arguments.model_types:
        facts = {"seed": 0, "limit": LIMIT, **provenance()}
        RESULTS.write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")
        before, after = PAGE.read_text().split(TABLE[0])[0], PAGE.read_text().split(TABLE[1])[1]
        PAGE.write_text(f"{before}{TABLE[0]}{table(results)}{TABLE[1]}{after}")
    wrong = [name for name, result in results.items() if result["verdict"] == "wrong"]
    if wrong:
        raise SystemExit(f"Composed, but wrong: {', '.join(wrong)}.")


if __name__ == "__main__":
    main()
