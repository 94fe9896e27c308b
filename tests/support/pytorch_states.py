"""Tiny checkpoints as PyTorch's models have them: names and shapes by hand."""

import re

import jax
import ml_dtypes
import numpy as np
from adapter_files import flatten, unflatten
from safetensors.numpy import save_file

VOCAB, WIDTH, HIDDEN, POSITIONS = 50, 24, 40, 32
HEADS, KV_HEADS, HEAD = 4, 2, 6
"""Queries are square, so that a transposed kernel has the right shape."""

KERNELS = {
    "self_attn.q_proj": (HEADS * HEAD, WIDTH),
    "self_attn.k_proj": (KV_HEADS * HEAD, WIDTH),
    "self_attn.v_proj": (KV_HEADS * HEAD, WIDTH),
    "self_attn.o_proj": (WIDTH, HEADS * HEAD),
    "mlp.gate_proj": (HIDDEN, WIDTH),
    "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN),
}
NORMS = ["input_layernorm", "post_attention_layernorm"]
SANDWICH = ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
CONV1D = {
    "attn.c_attn": (WIDTH, 3 * WIDTH),
    "attn.c_proj": (WIDTH, WIDTH),
    "mlp.c_fc": (WIDTH, 4 * WIDTH),
    "mlp.c_proj": (4 * WIDTH, WIDTH),
}
LINEAR = {
    **{f"attention.self.{name}": (WIDTH, WIDTH) for name in ("query", "key", "value")},
    "attention.output.dense": (WIDTH, WIDTH),
    "intermediate.dense": (HIDDEN, WIDTH),
    "output.dense": (WIDTH, HIDDEN),
}


def decoder(head=False, bias=False, head_norms=False, norms=()):
    """{tensor: its shape} of a Llama or one of its relatives."""
    found = {"model.embed_tokens.weight": (VOCAB, WIDTH)}
    for layer in (f"model.layers.{n}" for n in range(2)):
        found |= {f"{layer}.{m}.weight": shape for m, shape in KERNELS.items()}
        found |= {f"{layer}.{norm}.weight": (WIDTH,) for norm in (*NORMS, *norms)}
        for name in "qkv" if bias else "":
            module = f"self_attn.{name}_proj"
            found[f"{layer}.{module}.bias"] = KERNELS[module][:1]
        for name in "qk" if head_norms else "":
            found[f"{layer}.self_attn.{name}_norm.weight"] = (HEAD,)
    found["model.norm.weight"] = (WIDTH,)
    return found | ({"lm_head.weight": (VOCAB, WIDTH)} if head else {})


def _with_bias(module, shape, outputs=0, weight="weight", bias="bias"):
    return {f"{module}.{weight}": shape, f"{module}.{bias}": (shape[outputs],)}


def gpt2():
    """As the first files have it, which do not begin with "transformer."."""
    found = {"wte.weight": (VOCAB, WIDTH), "wpe.weight": (POSITIONS, WIDTH)}
    for layer in (f"h.{n}" for n in range(2)):
        for module, shape in CONV1D.items():
            found |= _with_bias(f"{layer}.{module}", shape, 1)
        for norm in ("ln_1", "ln_2"):
            found |= _with_bias(f"{layer}.{norm}", (WIDTH,))
    return found | _with_bias("ln_f", (WIDTH,))


def bert():
    """As the first files have it, with gammas and betas."""

    def norm(module):
        return _with_bias(f"{module}.LayerNorm", (WIDTH,), 0, "gamma", "beta")

    start = "bert.embeddings"
    found = {f"{start}.word_embeddings.weight": (VOCAB, WIDTH)}
    found[f"{start}.position_embeddings.weight"] = (POSITIONS, WIDTH)
    found[f"{start}.token_type_embeddings.weight"] = (2, WIDTH)
    found |= norm(start)
    for layer in (f"bert.encoder.layer.{n}" for n in range(2)):
        for module, shape in LINEAR.items():
            found |= _with_bias(f"{layer}.{module}", shape)
        found |= norm(f"{layer}.attention.output") | norm(f"{layer}.output")
    head = "cls.predictions"
    found |= _with_bias(f"{head}.transform.dense", (WIDTH, WIDTH))
    return found | norm(f"{head}.transform") | {f"{head}.bias": (VOCAB,)}


STATES = {
    "llama": decoder(head=True),
    "gemma": decoder(),
    "qwen2": decoder(bias=True),
    "qwen3": decoder(head=True, head_norms=True),
    "gemma3": decoder(head_norms=True, norms=SANDWICH),
    "gpt2": gpt2(),
    "bert": bert(),
}
"""What a family's model needs."""


def beside(family, state):
    """What the family's files hold too."""
    ids = np.arange(POSITIONS)[None]
    if family == "llama":
        return {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    if family == "gemma":
        return {"lm_head.weight": state["model.embed_tokens.weight"].copy()}
    if family == "gpt2":
        mask = np.ones((1, 1, POSITIONS, POSITIONS), np.uint8)
        return {"h.0.attn.bias": mask, "h.1.attn.masked_bias": np.array(-1e4)}
    if family == "bert":
        head, table = "cls.predictions", "bert.embeddings.word_embeddings.weight"
        found = {"bert.embeddings.position_ids": ids}
        found[f"{head}.decoder.bias"] = state[f"{head}.bias"].copy()
        return found | {f"{head}.decoder.weight": state[table].copy()}
    return {}


def numbers(family, dtype=np.float32):
    """{tensor: random numbers} of a family."""
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(0, 0.3, shape).astype(dtype)
        for name, shape in STATES[family].items()
    }


def stored(path, family, dtype=np.float32, change=lambda tensors: None):
    """A family's file, and the numbers in it."""
    state = numbers(family, dtype)
    tensors = {**state, **beside(family, state)}
    change(tensors)
    save_file(tensors, path)
    return state


def in_flax(family, state):
    """The same numbers with the names and layouts of transformers' Flax models."""
    flat = {}
    for name, array in state.items():
        *module, last = name.split(".")
        if module[0] in ("wte", "wpe", "h", "ln_f"):
            module = ["transformer", *module]
        if last in ("weight", "gamma"):
            last = "weight" if family[:4] in ("llam", "gemm", "qwen") else "scale"
            if array.ndim == 2:
                table = re.search("embed|wte|wpe", module[-1])
                last = "embedding" if table else "kernel"
                array = array if table else array.T
        flat["/".join([*module, {"beta": "bias"}.get(last, last)])] = array
    return unflatten(flat)


def shapes(tree, dtype=None):
    """The shapes of arrays."""
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, dtype or array.dtype), tree
    )


BFLOAT16 = ml_dtypes.bfloat16


def with_heads(tree):
    """The same with an axis for heads, where attention has them."""
    flat = flatten(tree)
    for path, leaf in flat.items():
        if re.search("self_attn/[qkv]_proj", path):
            flat[path] = leaf.reshape(*leaf.shape[:-1], -1, HEAD)
        elif "o_proj" in path:
            flat[path] = leaf.reshape(-1, HEAD, leaf.shape[-1])
    return unflatten(flat)


def stacked(family, tree):
    """The same with stacked layers, and the templates for it."""
    flat, names = {}, {}
    for path, leaf in flatten(tree).items():
        if number := re.search(r"/(\d+)/", path):
            path = path.replace(number[0], "/")
            flat.setdefault(path, []).append(leaf)
        else:
            flat[path] = leaf
    for name, shape in STATES[family].items():
        if re.search(r"\.0\..*(weight|gamma)$", name):
            module = name.rpartition(".")[0]
            path = ("transformer/" if family == "gpt2" else "") + module
            ends = ("kernel",) if len(shape) == 2 else ("weight", "scale")
            for last in ends:
                path = module.replace(".0.", "/").replace(".", "/") + f"/{last}"
                path = f"transformer/{path}" if family == "gpt2" else path
                if path in flat:
                    names[module.replace(".0.", ".{n}.")] = f"{path}[{{n}}]"
    both = {k: np.stack(v) if isinstance(v, list) else v for k, v in flat.items()}
    return unflatten(both), names


def layouts(family, state):
    """{layout: (the expected tree, names)}."""
    tree = in_flax(family, state)
    heads = with_heads(tree)
    return {"heads": (heads, family), "stacked": stacked(family, heads)}
