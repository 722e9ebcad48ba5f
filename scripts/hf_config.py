"""config.json of a HuggingFace directory ↔ the header of a weights file.

Releases of transformers read rotary settings from different places: 5.x from rope_scaling, else from rope_parameters,
and there alone but for rotary_emb_base and rotary_pct, which stand in for a base and a share that are not there; 4.57
from rope_scaling, rotary_emb_base and rotary_pct. No release reads rope_theta or partial_rotary_factor beside those. We
write all of them in such a way that they agree, and refuse a file in which any place says something else than is read.
A file with rope_parameters alone is 5.x's own, and is read as 5.x does.

    mode      written as       read by transformers
    none      default
    ntk       default          with the stretched base
    linear    linear           4.36 on
    dynamic   dynamic          4.36 on; it takes the original window from max_position_embeddings, so that is what
                               stands there, and the long context under "longhand"
    yarn      yarn             4.57 and 5.x by factor and original_max_position_embeddings; 4.51 takes the long context
                               over the original one for the factor, so that must be the scale; 4.46 cannot be right

What HuggingFace has no place for (a dynamic model's context, ntk's mode and scale) is under "longhand". It is believed
only where it means the same rotation as the settings beside it, so editing those is safe.
"""

import dataclasses
import math
from typing import Any, Optional

from weights_file import GELU_ERF, GELU_TANH, GPT2, INT_MAX, MODES, MOST_BASE, NEOX, Header, InputError, check, padded

TANH_NAMES = ("gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate")
ERF_NAMES = ("gelu", "gelu_python")
TORCH_DTYPE = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
NOTE = "longhand"
# Key, the one value that the trainer computes with, and what transformers takes where the key is absent.
FIXED: dict[str, tuple[tuple[str, Any, Any], ...]] = {
    GPT2: (
        ("layer_norm_epsilon", 1e-5, 1e-5),
        ("scale_attn_weights", True, True),
        ("scale_attn_by_inverse_layer_idx", False, False),
        ("reorder_and_upcast_attn", False, False),
        ("add_cross_attention", False, False),
        ("tie_word_embeddings", True, True),
    ),
    NEOX: (
        ("layer_norm_eps", 1e-5, 1e-5),
        ("attention_bias", True, True),
        ("tie_word_embeddings", False, False),
    ),
}
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "original_max_position_embeddings"}
# YaRN's own settings, each with the value that means the default.
YARN_DEFAULTS: dict[str, Any] = {"beta_fast": 32, "beta_slow": 1, "truncate": True, "mscale": 0, "mscale_all_dim": 0}


class Config:
    """config.json, whose every value is asked for by name and kind."""

    def __init__(self, values: dict[str, Any], path: str):
        self.values, self.path = values, path

    def refuse(self, key: str, says: str):
        raise InputError(f"{self.path}: {key} {says}")

    def whole(self, key: str, default: Optional[int] = None) -> int:
        value = self.values.get(key, default)
        if value is None:
            self.refuse(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= INT_MAX:
            self.refuse(key, f"is {value!r}, not a whole number from 1 to {INT_MAX}")
        return value

    def real(self, where: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e300:
            self.refuse(where, f"is {value!r}, not a number of usable size")
        return float(value)

    def one(self, what: str, read: dict[str, Any], others: dict[str, Any], default: Any) -> Any:
        """The value at the first place that is read, else the default; every other place must agree with it."""
        given = {place: value for place, value in read.items() if value is not None} or {"transformers' default": default}
        first = next(iter(given))
        for place, value in (given | others).items():
            if value is not None and value != given[first]:
                self.refuse(what, f"is {given[first]!r} as {first} and {value!r} as {place}; make them agree")
        return given[first]


def rope_of(config: Config, header: Header):
    """Fills the header's rotary settings as transformers reads them."""
    values, D = config.values, header.C // header.H
    sections: dict[str, dict[str, Any]] = {}
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(key) or {}, dict):
            config.refuse(key, f"is {values[key]!r}, not an object")
        if values.get(key):
            sections[key] = values[key]

    chosen = next(iter(sections), "")  # rope_scaling, should both be there
    if values.get("head_dim") not in (None, D):  # the rotation would be of this many dimensions, all else of D
        config.refuse("head_dim", f"is {values['head_dim']!r}, and hidden_size over num_attention_heads {D}; make them agree")

    def one(what: str, *keys: str, top: str = "", unread: str = "", default: Any = None) -> Any:
        """`top` stands in for the section's key. 4.57 reads it alone, so that beside rope_scaling it is first."""
        inside = {f"{name}.{key}": section.get(key) for name, section in sections.items() for key in keys}
        read = {place: value for place, value in inside.items() if place.startswith(f"{chosen}.")}
        if top:
            outside = {top: values.get(top)}
            read = outside if chosen == "rope_scaling" else read | outside
        return config.one(what, read, inside | ({unread: values.get(unread)} if unread else {}), default)

    kind = one("rope_type", "rope_type", "type", default="default")
    if kind not in ("default", "linear", "dynamic", "yarn"):
        config.refuse("rope_type", f"is {kind!r}; default, linear, dynamic and yarn are known")
    allowed = ROPE_KEYS | ({"factor"} if kind != "default" else set())
    allowed |= {*YARN_DEFAULTS, "attention_factor"} if kind == "yarn" else set()
    for name, section in sections.items():
        for key in section:
            if key not in allowed and section[key] is not None:
                config.refuse(f"{name}.{key}", f"is {section[key]!r}, which rope {kind} does not have here")
    header.mode = MODES.index("none" if kind == "default" else kind)
    base = one("the rotary base", "rope_theta", top="rotary_emb_base", unread="rope_theta", default=10000.0)
    header.base = config.real("the rotary base", base)
    share = one("the rotated share", "partial_rotary_factor", top="rotary_pct", unread="partial_rotary_factor",
                default=0.25)
    share = config.real("the rotated share", share)
    if not 0 <= share <= 1:
        config.refuse("the rotated share", f"is {share:g}, not from 0 to 1")
    header.dims = int(D * share)  # as transformers does
    if kind != "default":
        factor = one("the rope factor", "factor")
        if factor is None:
            config.refuse("rope factor", f"is missing, which rope {kind} needs")
        header.scale = config.real("rope factor", factor)
    window = "original_max_position_embeddings"
    header.original = config.whole("max_position_embeddings")
    # yarn takes it from its section, else max_position_embeddings; the other modes do without.
    given = one(window, window, unread=window, default=header.original if kind == "yarn" else values.get(window))
    if given is not None:
        original = Config({window: given}, config.path).whole(window)
        if kind == "dynamic" and original != header.original:
            config.refuse(window, f"is {original}, but transformers takes rope dynamic's from max_position_embeddings, "
                          f"{header.original}; make them agree")
        header.original = original
    if kind == "yarn":
        for key, default in YARN_DEFAULTS.items():
            value = one(key, key, default=default)
            if value != default:
                config.refuse(key, f"is {value!r}; yarn is known with {default!r} only")
        factor, usual = one("attention_factor", "attention_factor"), 0.1 * math.log(max(header.scale, 1.0)) + 1.0
        if factor is not None and not math.isclose(config.real("attention_factor", factor), usual, rel_tol=1e-6):
            config.refuse("attention_factor", f"is {factor!r}; yarn is known with 0.1 ln(factor) + 1 = {usual:g} only")


def rotation(header: Header) -> tuple:
    """Equal for two headers if they rotate alike in transformers."""
    mode = MODES[header.mode]
    if mode in ("none", "ntk"):
        return "default", header.stretched_base()
    return mode, header.base, header.scale, header.original if mode != "linear" else 0


def with_note(config: Config, header: Header) -> Header:
    """What only we write into config.json, where it does not contradict the rest."""
    note = config.values.get(NOTE)
    if note is None or header.family != NEOX:
        return header
    if not isinstance(note, dict) or note.get("rope", "none") not in MODES:
        config.refuse(NOTE, "is damaged; remove it")
    told = dataclasses.replace(header)
    inside = Config(note, f"{config.path}: {NOTE}")
    told.maxT = inside.whole("context", header.maxT)
    told.mode = MODES.index(note.get("rope", MODES[header.mode]))
    told.base = inside.real("rope_base", note.get("rope_base", header.base))
    told.scale = inside.real("rope_scale", note.get("rope_scale", header.scale))
    check(told, inside.path)
    return told if rotation(told) == rotation(header) else header


def header_of(values: dict[str, Any], dtype: str, path: str) -> Header:
    """The header of the weights file that a config.json describes; InputError for what the trainer does not compute."""
    config = Config(values, path)
    family = values.get("model_type")
    if not isinstance(family, str) or family not in FIXED:
        config.refuse("model_type", f"is {family!r}; {GPT2} and {NEOX} are known")
    for key, value, absent in FIXED[family]:
        if values.get(key, absent) != value or isinstance(values.get(key, absent), bool) != isinstance(value, bool):
            config.refuse(key, f"is {values[key]!r}; only {value!r} is supported")
    for key in ("quantization_config", "pruned_heads"):
        if values.get(key):
            config.refuse(key, "is set; only plain weights are supported")
    names = (
        ("n_positions", "vocab_size", "n_layer", "n_head", "n_embd", "n_inner", "activation_function")
        if family == GPT2
        else ("max_position_embeddings", "vocab_size", "num_hidden_layers", "num_attention_heads", "hidden_size",
              "intermediate_size", "hidden_act")
    )
    maxT, V, L, H, C = (config.whole(name) for name in names[:5])
    if values.get(names[5]) is not None or family == NEOX:  # GPT-2's null means four times the width
        if config.whole(names[5]) != 4 * C:
            config.refuse(names[5], f"is {values[names[5]]}; only four times the width, {4 * C}, is supported")
    activation = values.get(names[6], "gelu_new" if family == GPT2 else "gelu")
    known = TANH_NAMES if family == GPT2 else ERF_NAMES + TANH_NAMES
    if activation not in known:
        config.refuse(names[6], f"is {activation!r}; {', '.join(known)} are supported")
    header = Header(family, dtype, maxT, V, L, H, C, padded(V))
    if C % H:
        config.refuse(names[4], f"{C} is not divisible by {H} heads")
    if family == NEOX:
        header.gelu = GELU_TANH if activation in TANH_NAMES else GELU_ERF
        parallel = values.get("use_parallel_residual", True)
        if not isinstance(parallel, bool):
            config.refuse("use_parallel_residual", f"is {parallel!r}, neither true nor false")
        header.parallel = int(parallel)
        rope_of(config, header)
    check(header, path)
    return with_note(config, header)


def rotary_share(dims: int, D: int) -> float:
    """The number that int(D · share) makes dims of, as transformers computes it."""
    share = dims / D
    return share if int(D * share) == dims else math.nextafter(share, 1.0)


def config_of(header: Header, context: int, eot: Optional[int], path: str) -> dict[str, Any]:
    """config.json for a weights file at its long context; `eot` is the token that ends a text, if it is known."""
    shared = {
        "vocab_size": header.V,
        "bos_token_id": eot,
        "eos_token_id": eot,
        "use_cache": True,
        "torch_dtype": TORCH_DTYPE[header.dtype],  # 4.x
        "dtype": TORCH_DTYPE[header.dtype],
    }
    if header.family == GPT2:
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": GPT2,
            "n_positions": context,
            "n_ctx": context,
            "n_embd": header.C,
            "n_layer": header.L,
            "n_head": header.H,
            "n_inner": None,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": 1e-5,
            # The trainer has no dropout; transformers' default for GPT-2 is 0.1.
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
            "tie_word_embeddings": True,
            **shared,
        }
    mode = MODES[header.mode]
    if mode == "yarn" and header.softmax_temperature:
        raise InputError(
            f"{path}: its yarn has the temperature on the softmax (header [12] = 1); transformers can only put it on "
            "the rotated dimensions, so an exported model would compute something else"
        )
    share, base = rotary_share(header.dims, header.C // header.H), header.stretched_base()
    if base > MOST_BASE:  # transformers computes with it in float32
        raise InputError(f"{path}: ntk's stretched base is {base:g}; config.json can have at most {MOST_BASE:g}")
    kind = "default" if mode in ("none", "ntk") else mode
    scaling: dict[str, Any] = {}
    if kind != "default":  # 4.36 wants exactly these two keys, and the factor as a float
        scaling = {"type": kind, "factor": header.scale}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = header.original
    parameters = {"rope_type": kind, **{key: value for key, value in scaling.items() if key != "type"}}
    made = {
        "architectures": ["GPTNeoXForCausalLM"],
        "model_type": NEOX,
        "max_position_embeddings": header.original if mode == "dynamic" else context,
        "original_max_position_embeddings": header.original,
        "hidden_size": header.C,
        "num_hidden_layers": header.L,
        "num_attention_heads": header.H,
        "intermediate_size": 4 * header.C,
        "hidden_act": "gelu" if header.gelu == GELU_ERF else "gelu_new",
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": bool(header.parallel),
        "attention_bias": True,
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "tie_word_embeddings": False,
        "rotary_pct": share,
        "partial_rotary_factor": share,
        "rotary_emb_base": base,
        "rope_theta": base,
        "rope_scaling": scaling or None,
        "rope_parameters": {**parameters, "rope_theta": base, "partial_rotary_factor": share},
        **shared,
    }
    # What the file says and reading this config.json would not.
    back = header_of(made, header.dtype, path)
    note: dict[str, Any] = {} if back.maxT == context else {"context": context}
    if (back.mode, back.base, back.scale) != (header.mode, header.base, header.scale):
        note |= {"rope": mode, "rope_base": header.base, "rope_scale": header.scale}
    return made | ({NOTE: note} if note else {})
