"""A GGUF file as a Hugging Face folder: the weights dequantised to float32, the configuration and the tokenizer.

What comes out is what the engine and transformers read: config.json, generation_config.json, model.safetensors,
tokenizer.json and tokenizer_config.json. Weights pass through one tensor at a time, so memory stays near the size of
the largest. Sources: the GGUF specification (ggml, docs/gguf.md), the safetensors format (huggingface/safetensors,
README) and llama.cpp's convert_hf_to_gguf.py, whose work is undone here.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pagoda.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFReader, ReaderTensor
    from tokenizers import Tokenizer, pre_tokenizers

Progress = Callable[[int, int], None]
"""Called with (bytes of weights written, bytes of weights in all) after each tensor."""

ARCHITECTURES = ("llama",)
PRE_TOKENIZERS = ("smollm",)
TEMPORARY_PREFIX = ".incoming-"
"""Folders of this name are conversions under way, or the remains of one that was killed."""
SOURCE = "converted_from.json"
"""In a converted folder: which file it was made of (`fingerprint`)."""

_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
_USER_DEFINED_TOKEN = 4
_ROPE_SCALINGS_THAT_DO_NOTHING = (None, "none")

_TOP_LEVEL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def convert(gguf_file: Path, folder: Path, *, progress: Progress | None = None) -> None:
    """Writes the model of `gguf_file` into `folder`, which appears complete or not at all.

    Raises CheckpointError when the file is no GGUF or holds something that would be lost on the way (another
    architecture, tokenizer or tensor), and ConfigError when `folder` exists.
    """
    source = fingerprint(gguf_file)
    model = _GgufModel.open(gguf_file)
    with _appearing_at_once(folder) as incoming:
        _write_json(incoming / SOURCE, source)
        _write_json(incoming / "config.json", model.config())
        _write_json(incoming / "generation_config.json", model.generation_config())
        model.tokenizer().save(str(incoming / "tokenizer.json"))
        _write_json(incoming / "tokenizer_config.json", model.tokenizer_config())
        _write_safetensors(incoming / "model.safetensors", model.weights(), progress)


def fingerprint(gguf_file: Path) -> dict[str, Any]:
    """Which file it is, and as it was when."""
    file = gguf_file.resolve()
    stat = file.stat()
    return {"file": str(file), "bytes": stat.st_size, "modified_ns": stat.st_mtime_ns}


@dataclass(frozen=True)
class _Weight:
    """One tensor on its way: its name and shape in the Hugging Face folder, and how to get its float32 values."""

    name: str
    shape: tuple[int, ...]
    load: Callable[[], np.ndarray[Any, Any]]

    @property
    def num_bytes(self) -> int:
        count = 4
        for extent in self.shape:
            count *= extent
        return count


class _GgufModel:
    """The metadata and tensors of one GGUF file, read as a Hugging Face Llama."""

    def __init__(self, file: Path, reader: GGUFReader) -> None:
        self._file = file
        self._reader = reader
        self._refuse_what_would_be_lost()

    @classmethod
    def open(cls, file: Path) -> _GgufModel:
        from gguf import GGUFReader

        try:
            reader = GGUFReader(file)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise CheckpointError(f"{file} cannot be read as a GGUF file: {error}") from error
        return cls(file, reader)

    def _refuse_what_would_be_lost(self) -> None:
        self._allow("general.architecture", ARCHITECTURES)
        self._allow("tokenizer.ggml.model", ("gpt2",))
        self._allow("tokenizer.ggml.pre", PRE_TOKENIZERS)
        self._allow("llama.rope.scaling.type", _ROPE_SCALINGS_THAT_DO_NOTHING)
        self._allow("llama.expert_count", (None, 0))
        self._allow("tokenizer.ggml.add_bos_token", (None, False))

    def _allow(self, key: str, allowed: Sequence[Any]) -> None:
        value = self._get(key)
        if value not in allowed:
            names = ", ".join("(absent)" if item is None else str(item) for item in allowed)
            raise CheckpointError(
                f"{self._file.name} says {key} = {value}; supported here: {names}. "
                "Use the model's original Hugging Face folder instead: `pagoda pull FOLDER`."
            )

    def _get(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        try:
            return default if field is None else field.contents()
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self._file.name} is damaged at {key}: {error}. Get the file again.") from error

    def _require(self, key: str) -> Any:
        value = self._get(key)
        if value is None:
            raise CheckpointError(f"{self._file.name} lacks {key}: the file is incomplete, get it again.")
        return value

    # Configuration

    def config(self) -> dict[str, Any]:
        """config.json, in the words of the published Llama folders."""
        num_heads = self._require("llama.attention.head_count")
        hidden_size = self._require("llama.embedding_length")
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden_size,
            "intermediate_size": self._require("llama.feed_forward_length"),
            "num_hidden_layers": self._require("llama.block_count"),
            "num_attention_heads": num_heads,
            "num_key_value_heads": self._get("llama.attention.head_count_kv", num_heads),
            "head_dim": self._get("llama.attention.key_length", hidden_size // num_heads),
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "max_position_embeddings": self._require("llama.context_length"),
            "rope_theta": _shortest(self._get("llama.rope.freq_base", 10000.0)),
            "rope_scaling": None,
            "rms_norm_eps": _shortest(self._require("llama.attention.layer_norm_rms_epsilon")),
            "vocab_size": len(self._require("tokenizer.ggml.tokens")),
            "tie_word_embeddings": "output.weight" not in {tensor.name for tensor in self._reader.tensors},
            **self._special_token_ids(),
            # The same fact twice: the published name, and the name that transformers writes since 4.56.
            "torch_dtype": "float32",
            "dtype": "float32",
        }

    def generation_config(self) -> dict[str, Any]:
        return self._special_token_ids()

    def _special_token_ids(self) -> dict[str, int]:
        ids = {
            "bos_token_id": self._get("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self._require("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self._get("tokenizer.ggml.padding_token_id"),
        }
        return {name: token_id for name, token_id in ids.items() if token_id is not None}

    # Tokenizer

    def tokenizer(self) -> Tokenizer:
        """The byte-level BPE of the file.

        Built here and not by transformers, which disregards `tokenizer.ggml.pre`: without the split into single
        digits "a  1" becomes other tokens than those the model was trained on.
        """
        from tokenizers import Tokenizer, decoders, models

        tokens = self._require("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ", 1)) for merge in self._require("tokenizer.ggml.merges")]
        tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
        tokenizer.pre_tokenizer = _smollm_pre_tokenizer()
        tokenizer.decoder = decoders.ByteLevel()
        self._add_special_tokens(tokenizer, tokens)
        return tokenizer

    def _add_special_tokens(self, tokenizer: Tokenizer, tokens: list[str]) -> None:
        from tokenizers import AddedToken

        types = self._require("tokenizer.ggml.token_type")
        kinds = list(zip(tokens, types, strict=True))
        tokenizer.add_special_tokens([_added(AddedToken, t, True) for t, kind in kinds if kind == _CONTROL_TOKEN])
        tokenizer.add_tokens([_added(AddedToken, t, False) for t, kind in kinds if kind == _USER_DEFINED_TOKEN])

    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json: the roles of the special tokens, and the chat template where the file has one."""
        tokens = self._require("tokenizer.ggml.tokens")
        roles = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
        ids = {role: self._get(f"tokenizer.ggml.{name}_token_id") for role, name in roles.items()}
        template = self._get("tokenizer.chat_template")
        return {
            # Not the class of the original (GPT2Tokenizer): transformers 5 would rebuild GPT-2's own pre-tokenizer.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": False,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "model_max_length": self._require("llama.context_length"),
            **{f"{role}_token": tokens[token_id] for role, token_id in ids.items() if token_id is not None},
            **({} if template is None else {"chat_template": template}),
        }

    # Weights

    def weights(self) -> list[_Weight]:
        """All weights in the file's order. Nothing is loaded yet."""
        return [self._weight(tensor) for tensor in self._reader.tensors]

    def _weight(self, tensor: ReaderTensor) -> _Weight:
        name = self._hugging_face_name(tensor.name)
        shape = tuple(int(extent) for extent in reversed(tensor.shape))  # GGUF counts from the fastest dimension
        return _Weight(name, shape, lambda: self._load(tensor, shape))

    def _hugging_face_name(self, name: str) -> str:
        if name in _TOP_LEVEL_NAMES:
            return _TOP_LEVEL_NAMES[name]
        match = _LAYER_TENSOR.fullmatch(name)
        if match is None or match[2] not in _LAYER_NAMES:
            raise CheckpointError(
                f"{self._file.name} holds the tensor {name}, which a plain Llama has no place for. "
                "Use the model's original Hugging Face folder instead: `pagoda pull FOLDER`."
            )
        return f"model.layers.{match[1]}.{_LAYER_NAMES[match[2]]}.weight"

    def _load(self, tensor: ReaderTensor, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
        from gguf.quants import dequantize

        values = dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype("<f4", copy=False)
        num_heads = self._require("llama.attention.head_count")
        if ".attn_q." in tensor.name:
            return _unpermute(values, num_heads)
        if ".attn_k." in tensor.name:
            return _unpermute(values, self._get("llama.attention.head_count_kv", num_heads))
        return values


def _unpermute(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Undoes llama.cpp's reordering of a query or key projection, [heads * head_dim, hidden].

    llama.cpp rotates neighbours (2i, 2i+1) where Hugging Face rotates halves (i, i + head_dim/2); its conversion
    interleaves each head's rows to suit (convert_hf_to_gguf.py, LlamaModel.permute).
    """
    half = weight.shape[0] // num_heads // 2
    return weight.reshape(num_heads, half, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def _shortest(value: float) -> float:
    """The shortest decimal that means the same float32: GGUF stores 1e-5 as 9.999999747378752e-06."""
    import numpy as np

    return float(str(np.float32(value)))


def _smollm_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Single digits, then GPT-2's words (llama.cpp: LLAMA_VOCAB_PRE_TYPE_SMOLLM; SmolLM2's own tokenizer.json)."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([digits, words])


def _added(make: Callable[..., Any], token: str, special: bool) -> Any:
    return make(token, special=special, normalized=False)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_safetensors(file: Path, weights: list[_Weight], progress: Progress | None) -> None:
    """Writes float32 weights one by one: the header is known before any of them is loaded."""
    header = _safetensors_header(weights)
    total = sum(weight.num_bytes for weight in weights)
    done = 0
    with file.open("wb") as out:
        out.write(len(header).to_bytes(8, "little"))
        out.write(header)
        for weight in weights:
            out.write(weight.load().tobytes())
            done += weight.num_bytes
            if progress is not None:
                progress(done, total)
        out.flush()
        os.fsync(out.fileno())


def _safetensors_header(weights: list[_Weight]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for weight in weights:
        end = begin + weight.num_bytes
        entries[weight.name] = {"dtype": "F32", "shape": list(weight.shape), "data_offsets": [begin, end]}
        begin = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    return header + b" " * (-len(header) % 8)  # the payload starts at a multiple of 8 bytes


@contextmanager
def _appearing_at_once(folder: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `folder` when the block succeeds, and is removed when it does not."""
    if folder.exists():
        raise ConfigError(f"{folder} exists already. Remove it first, or give another name.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    incoming = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY_PREFIX}{folder.name}-", dir=folder.parent))
    try:
        yield incoming
        incoming.chmod(0o755)  # mkdtemp's 0700 would hide the model from a server that runs as another user
        incoming.rename(folder)
    except BaseException:
        shutil.rmtree(incoming, ignore_errors=True)
        raise
