"""Small uses of each page's module, in which every function that a student writes is called.

`folo_lib.course.written` runs them, and compares each call with the learner's. A scene is named
after the module of its page and gets that module; those of Triton kernels are in
`kernel_scenes.py`. What a scene hands to `share` is not copied for each call.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = ["SHARED"]

SHARED: list[Any] = []
"""What may be the same object in both calls, since no taught function changes it."""


def share(*things: Any) -> None:
    SHARED.extend(things)


def attempt(function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
    """A call that is meant to fail."""
    with contextlib.suppress(ValueError, RuntimeError, OSError, TypeError):
        function(*args, **kwargs)


def make_config(**fields: Any) -> Any:
    """A Qwen3 of three small layers, of which no two sizes are equal."""
    from transformers import Qwen3Config

    shape: dict[str, Any] = {
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "eos_token_id": None,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    return Qwen3Config(**(shape | fields))


def make_model(**fields: Any) -> Any:
    """Such a model with random weights, those of its norms too."""
    from folo_lib.qwen3 import Qwen3ForCausalLM

    model = Qwen3ForCausalLM(make_config(**fields))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    return model.eval().requires_grad_(False)


def make_request(name: str = "a", token_ids: Any = (1, 2, 3), **fields: Any) -> Any:
    """A greedy request of token ids."""
    from folo_lib.request import Request, RequestMetrics
    from folo_lib.sampling_params import SamplingParams

    given: dict[str, Any] = {
        "request_id": name,
        "prompt_token_ids": list(token_ids),
        "params": SamplingParams(temperature=0, ignore_eos=True),
        "seed": 0,
        "max_tokens": 4,
        "metrics": RequestMetrics(0.0),
    }
    return Request(**(given | fields))


def attention(m: ModuleType) -> None:
    for sizes in ((1, 1), (3, 3), (1, 5), (2, 5)):
        m.create_causal_mask(*sizes)
    m.create_causal_mask(2, 4, torch.float64, "cpu")
    for sizes in ((0, 3), (4, 3)):
        attempt(m.create_causal_mask, *sizes)
    x = torch.randn(2, 3, 4, 5)
    for n_rep in (1, 2, 3):
        m.repeat_kv(x, n_rep)
    m.repeat_kv(x[0], 2)
    query, key, value = torch.randn(2, 6, 3, 5), x, torch.randn_like(x)
    m.naive_attention(query, key, value, 0.3)
    m.naive_attention(query, key, value, 0.3, m.create_causal_mask(3, 4))
    m.naive_attention(query[0], key[0], value[0], 2.0)
    low = (one.bfloat16() for one in (query, key, value))
    m.naive_attention(*low, 0.3)
    attempt(m.naive_attention, query[:, :5], key, value, 0.3)


def rope(m: ModuleType) -> None:
    for head_dim, theta in ((2, 10.0), (8, 1e4), (16, 1e6)):
        m.compute_inv_freq(head_dim, theta)
    for head_dim in (7, 0):
        attempt(m.compute_inv_freq, head_dim, 1e4)
    inv_freq = torch.tensor([1.0, 0.1, 0.01])
    m.compute_cos_sin(torch.arange(5), inv_freq)
    cos, sin = m.compute_cos_sin(torch.tensor([[3, 1], [0, 7]]), inv_freq, 1.5)
    m.apply_rotary_emb(torch.randn(2, 2, 4, 6), cos, sin)
    for given in ((1.0,), (0.5,), (4.0,), (4.0, 2.0), (4.0, 2.0, 3.0), (4.0, 0.0, 3.0)):
        m.compute_yarn_attention_factor(*given)
    yarn = {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 2.5,
        "original_max_position_embeddings": 31,
    }
    plain = {"rope_type": "default", "rope_theta": 1e4}
    for positions, fields in ((40, plain), (40, yarn), (100, yarn)):
        m.longest_context(positions, fields)
    attempt(m.longest_context, 40, {"rope_type": "yarn", "rope_theta": 1e4})
    for fields in (plain, yarn):
        table = m.RotaryEmbedding(6, 40, fields)
        table.reset_parameters()
        table(torch.tensor([[0, 3], [39, 1]]))
        table(torch.tensor([5]), torch.bfloat16)
    with torch.device("meta"):
        m.RotaryEmbedding(6, 40, plain)


def layers(m: ModuleType) -> None:
    norm = m.RMSNorm(6, 1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(6))
    x, residual = torch.randn(2, 2, 3, 6)
    norm(x)
    norm(x, residual)
    norm(torch.zeros(1, 6))
    norm(x.bfloat16())
    norm.bfloat16()(x.bfloat16(), residual.bfloat16())
    norm.normalize(1e4 * x.half())
    act = m.SiLUAndMul()
    act(x)
    act(x[0].bfloat16())
    attempt(act, torch.randn(2, 5))


def qwen3(m: ModuleType) -> None:
    for fields in ({"attention_bias": True}, {"head_dim": 4}):
        model = make_model(**fields)
        ids = torch.randint(50, (2, 5))
        model(ids)
        model(ids[:1], torch.tensor([[3, 4, 5, 6, 7]]))
    layer, hidden = model.model.layers[0], torch.randn(1, 3, 24)
    cos, sin = model.model.rotary_emb(torch.arange(3))
    layer(hidden, None, cos, sin)
    layer.self_attn.q_norm = layer.self_attn.k_norm = None
    layer.self_attn(hidden, cos, sin)
    run_cached(model)
    attempt(model.model, ids[0], metadata=make_metadata())
    weight = torch.randn(20, 3)
    for name in ("a.qkv_proj.weight", "a.gate_up_proj.weight", "model.norm.weight"):
        m.split_merged(name, weight, [6, 2, 2])
    names = ("model.a", "model.b", "lm_head")
    views = {name: torch.zeros(2, 3) for name in names}
    full = {"b": torch.randn(2, 3), "model.a": torch.randn(2, 3)}
    full |= {"lm_head": torch.randn(2, 3), "x.rotary_emb.inv_freq": torch.randn(4)}
    with torch.no_grad():
        m.copy_weights(views, list(full.items()))
        wrong = full | {"b": torch.randn(3, 3), "c": torch.randn(1)}
        del wrong["lm_head"]
        attempt(m.copy_weights, views, list(wrong.items()))


def make_metadata() -> Any:
    """Two sequences: three tokens of a new one, and the sixth of another."""
    from folo_lib.kv_cache import AttentionMetadata

    return AttentionMetadata(
        block_size=4,
        slot_mapping=torch.tensor([8, 9, 10, 5]),
        block_table=torch.tensor([[2, 0], [0, 1]]),
        query_start_loc=torch.tensor([0, 3, 4]),
        seq_lens=torch.tensor([3, 6]),
        query_lens_list=[3, 1],
        seq_lens_list=[3, 6],
    )


def run_cached(model: Any) -> Tensor:
    """A step over a paged cache."""
    shape = (3, 4, 2, model.model.layers[0].self_attn.head_dim)
    caches = [(torch.randn(shape), torch.randn(shape)) for _ in model.model.layers]
    positions = torch.tensor([0, 1, 2, 5])
    hidden: Tensor = model.model(
        torch.tensor([4, 9, 2, 7]), positions, caches, make_metadata()
    )
    return hidden


def checkpoint(m: ModuleType) -> None:
    from safetensors.torch import save_file

    from folo_lib import bundled_model_path

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        attempt(m.find_weight_files, folder)
        (folder / "pytorch_model.bin").touch()
        attempt(m.find_weight_files, folder)
        parts = (
            {"a": torch.randn(2, 3), "b": torch.randn(4).bfloat16()},
            {"c": torch.randn(1)},
        )
        for i, part in enumerate(parts):
            save_file(part, folder / f"part-{i}.safetensors")
        files = m.find_weight_files(folder)
        list(m.read_weights(files))
        list(m.read_weights(files, headers_only=True))
        for names in (
            {"a": "part-0.safetensors"},
            {"a": "part-7.safetensors"},
            {"a": "../x.safetensors"},
            None,
        ):
            index = json.dumps({"weight_map": names})
            (folder / "model.safetensors.index.json").write_text(index)
            attempt(m.find_weight_files, folder)
        (folder / "model.safetensors.index.json").unlink()
        save_file({"d": torch.ones(2, dtype=torch.int8)}, folder / "model.safetensors")
        found = m.find_weight_files(folder)
        attempt(lambda: list(m.read_weights(found)))
        found[0].write_bytes(b"damaged")
        attempt(lambda: list(m.read_weights(found)))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for given in (
        ("auto", cpu, "bfloat16"),
        ("auto", cuda, "float16"),
        ("auto", cuda, None),
        ("auto", cuda, torch.float32),
        ("bfloat16", cpu, None),
        (torch.float16, cuda, None),
        ("int8", cpu, None),
        (torch.float64, cpu, None),
    ):
        attempt(m.resolve_dtype, *given)
    m.load_model(bundled_model_path(), device="cpu", use_tqdm=False)
    m.load_model(bundled_model_path(), "bfloat16", "cpu", "torch_naive", False)
    attempt(m.load_model, Path(name) / "nothing", device="cpu")


def kv_cache(m: ModuleType) -> None:
    key, value = torch.randn(2, 2, 3, 4, 5)
    caches = m.reshape_and_cache_kv(key, value)
    caches = m.reshape_and_cache_kv(key[:, :, 0], value[:, :, 0], *caches)
    attempt(m.reshape_and_cache_kv, key, value, caches[0], None)
    attempt(m.reshape_and_cache_kv, key, value[:1])
    attempt(m.reshape_and_cache_kv, key[:, :2], value[:, :2], *caches)
    config = make_config()
    for dtype in (torch.float32, torch.bfloat16):
        m.kv_bytes_per_token(config, dtype)
        m.allocate_kv_caches(
            config, 3, 5, dtype, "meta"
        )  # of memory that holds nothing
    for given in (([3, 1, 7], 0, 9, 4), ([3, 1, 7], 3, 5, 4), ([2], 1, 1, 4)):
        m.compute_slot_mapping(*given)
    for given in (([3], 0, 5, 4), ([3, 1], 5, 4, 4), ([3, 1], -1, 4, 4)):
        attempt(m.compute_slot_mapping, *given)
    cache, slots = torch.randn(4, 3, 2, 5), torch.tensor([7, 0, 11])
    m.write_cache(cache, slots, torch.randn(3, 2, 5))
    m.write_cache(cache, slots, torch.randn(3, 2, 5).double())
    for length in (1, 3, 4, 6):
        m.read_cache(cache, torch.tensor([2, 0, 9]), length)
    m.read_cache(cache, torch.tensor([1, 2]), 4, 3)
    for blocks, count in (([4, 5, 6], 3), ([4, 5, 9], 2), ([4, 6], 2), ([3], 1)):
        m.find_first_slot(torch.tensor(blocks), count, 16)
    m.find_first_slot(torch.empty(2, dtype=torch.int64, device="meta"), 2, 16)
    metadata = m.AttentionMetadata(
        block_size=4,
        slot_mapping=torch.tensor([8, 9, 5, 6]),
        block_table=torch.tensor([[2, 0], [0, 1], [3, 9]]),
        query_start_loc=torch.tensor([0, 2, 3, 4]),
        seq_lens=torch.tensor([2, 6, 3]),
        query_lens_list=[2, 1, 1],
        seq_lens_list=[2, 6, 3],
    )
    m.pad_sequences(metadata, [1, 2])
    m.pad_sequences(metadata, [2])
    blocks = m.BlockAllocator(6, 4)
    first, second = blocks.allocate(5), blocks.allocate(1)
    blocks.free(first)
    for num_tokens in (8, 12, 13):
        blocks.can_allocate(num_tokens)
        attempt(blocks.allocate, num_tokens)
    attempt(blocks.free, first)
    attempt(blocks.free, [*second, *second])
    attempt(blocks.free, [99])
    attempt(blocks.can_allocate, 0)
    assert blocks.num_free_blocks >= 0
    size = m.kv_bytes_per_token(config, torch.float32)
    for memory, wanted in (
        (size * 1000, None),
        (size * 1000, 20),
        (size * 90, 1),
        (size * 40, None),
    ):
        m.resolve_max_model_len(config, torch.float32, memory, wanted)
    for memory, wanted in ((size * 1000, 65), (size * 1000, 0), (size * 15, None)):
        attempt(m.resolve_max_model_len, config, torch.float32, memory, wanted)


def sampler(m: ModuleType) -> None:
    from folo_lib.sampling_params import SamplingParams

    logits = torch.randn(3, 12) * 3
    ties = torch.tensor([[2.0, 1.0, 2.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    each = torch.tensor([0.0, 0.3, 1.0])
    for values in (0.0, 0.1, 1.0, each):
        m.apply_min_p_filtering(logits, values)
    m.apply_min_p_filtering(ties, 0.3)
    for top_k in (0, -1, 1, 4, 99, torch.tensor([2, 0, 5])):
        m.apply_top_k_filtering(logits, top_k)
    m.apply_top_k_filtering(ties, 3)
    for top_p in (0.01, 0.5, 0.9, 1.0, torch.tensor([0.2, 0.7, 1.0])):
        m.apply_top_p_filtering(logits, top_p)
    m.apply_top_p_filtering(ties, 0.5)
    m.apply_top_p_filtering(logits + 50, 0.8)
    prompt_mask = torch.rand(3, 12) < 0.3
    counts = torch.randint(0, 3, (3, 12))
    strength = torch.tensor([1.0, 1.5, 0.7])
    m.apply_penalties(logits, prompt_mask, counts, strength, each, each.flip(0))
    m.apply_penalties(logits.half(), prompt_mask, counts, strength, 0 * each, -each)
    for fields, ids, eos in (
        ({}, [5, 6, 7], 7),
        ({}, [5, 6, 8], 7),
        ({}, [5, 6, 1], 7),
        ({"ignore_eos": True}, [5, 7], 7),
        ({"stop_token_ids": [3]}, [5, 3], None),
        ({"stop_token_ids": [3], "min_tokens": 2}, [5, 3], 7),
        ({"min_tokens": 2}, [5, 7], 7),
        ({"min_tokens": 2}, [5, 6, 7], 7),
        ({}, [1, 2, 3, 4], 7),
    ):
        m.check_stop_conditions(ids, SamplingParams(**fields), eos, {7, 8}, 4)
    base: dict[str, Any] = {
        "seeds": torch.tensor([1, 2, 3]),
        "sample_indices": torch.tensor([0, 0, 1]),
        "positions": torch.tensor([4, 5, 6]),
        "rows": torch.arange(3),
    }
    hot: dict[str, Any] = {"temperature": torch.tensor([0.0, 0.7, 2.0])}
    stops: dict[str, Any] = {
        "stop_token_mask": torch.rand(3, 12) < 0.4,
        "min_positions": torch.tensor([5, 5, 7]),
    }
    m.mask_early_stops(logits, m.SamplingMetadata(**base, **stops))
    broken = logits.clone()
    broken[1, 3] = float("nan")
    every: dict[str, Any] = {
        "min_p": torch.tensor([0.1, 0.0, 0.2]),
        "top_k": torch.tensor([3, 5, 0]),
        "max_top_k": 5,
        "top_p": torch.tensor([0.9, 0.5, 1.0], dtype=torch.float64),
    }
    top: dict[str, Any] = {key: every[key] for key in ("top_k", "max_top_k", "top_p")}
    top["top_k"] = torch.tensor([3, 5, 2])
    for fields in (hot, hot | every, hot | top | {"top_p_after_top_k": True}, {}):
        metadata = m.SamplingMetadata(**base, **fields)
        for given in (logits, logits.half(), broken):
            m.draw_tokens(m.apply_filters(given, metadata), metadata)
    m.draw_tokens(torch.full((3, 12), float("-inf")), m.SamplingMetadata(**base))


def runner(m: ModuleType) -> None:
    from folo_lib.sampling_params import SamplingParams

    def plan(*scheduled: Any, new: Any = (), over: Any = ()) -> Any:
        return m.StepPlan([m.ScheduledRequest(*one) for one in scheduled], new, over)

    def new(name: str, ids: list[int], **fields: Any) -> Any:
        params = SamplingParams(**({"temperature": 0.5} | fields))
        return m.NewRequest(
            request_id=name, token_ids=ids, num_prompt_tokens=len(ids), params=params
        )

    rows = m.RequestRows(4, 6, 12, torch.device("cpu"))
    rows.last_token_ids.copy_(torch.arange(5) + 5)
    a, b = new("a", [1, 2, 3, 4, 5], prompt_logprobs=2), new("b", [6, 7], top_k=3)
    for step in (
        plan(("a", 3, [2, 4]), ("b", 2, [1]), new=[a, b]),
        plan(("a", 2, [0]), ("b", 1, [5])),
        plan(("b", 1), ("a", 1)),
        plan(("c", 4, [3, 2]), ("b", 1, [7]), new=[new("c", [1, 1, 2, 2])], over=["a"]),
        plan(),
    ):
        rows.update(step)
        m.make_input_batch(rows, m.lay_end_to_end(rows, step, 2), 2)


def request(m: ModuleType) -> None:
    from transformers import AutoTokenizer

    from folo_lib import bundled_model_path
    from folo_lib.runner import SampledToken
    from folo_lib.sampling_params import SamplingParams

    m.byte_of_character()
    for text, stop, searched in (
        ("abcabc", ["bc", "ab"], 0),
        ("abcabc", ["bc", "ab"], 3),
        ("abcabc", ["cab"], 5),
        ("abcabc", ["cabc", "abc"], 3),
        ("abc", ["abcd", ""], 0),
        ("abc", [], 0),
        ("", ["a"], 0),
    ):
        m.find_stop_string(text, stop, searched)
        m.count_held_back(text, stop)
    for text, stop in (("xab", ["abc", "b!"]), ("aa", ["aaa"]), ("abc", ["abc"])):
        m.count_held_back(text, stop)
    m.count_held_back("ax", ["ab"])
    tokenizer = AutoTokenizer.from_pretrained(bundled_model_path())
    share(tokenizer)
    token_bytes = m.TokenBytes(tokenizer)
    share(token_bytes)
    ids = tokenizer("Mira saw a kite. 🙂 The end. It").input_ids
    special = tokenizer.eos_token_id
    for fields in (
        {},
        {"stop": ["kite. ", "nd."]},
        {"stop": ["kite"], "include_stop_str_in_output": True},
        {"stop": ["saw", "end"], "min_tokens": 4},
        {"skip_special_tokens": False, "stop": ["xyz"]},
    ):
        detokenizer = m.IncrementalDetokenizer(token_bytes, SamplingParams(**fields))
        for i, token_id in enumerate([*ids[:4], special, *ids[4:-1]]):
            found = detokenizer.append(token_id)
            if i == 3:
                assert isinstance(detokenizer.restart(ids[:3]).text, str)
            assert isinstance(detokenizer.text, str)
            if found:
                break
        detokenizer.flush()
        detokenizer.flush()
        assert isinstance(detokenizer.text, str)
    for start, end in ((None, 2.0), (1.0, None), (1.0, 3.5)):
        m.elapsed(start, end)
    early, late = m.RequestMetrics(1.0), m.RequestMetrics(2.0, peak_memory=5)
    m.merge_metrics([early, late])
    late.first_scheduled_time, late.num_cached_tokens = 2.5, 8
    for now in (3.0, 3.5, 5.0):
        assert late.tpot != -1 and late.throughput != -1
        late.record_token(now)
    assert late.tpot and late.throughput is None
    late.finished_time = 5.5
    assert late.tpot and late.throughput
    m.merge_metrics([late, early])
    early.record_token(2.0)
    assert early.tpot == 0
    early.finished_time = 2.0
    m.merge_metrics([early, late])
    for fields in (
        {"index": 2, "eos_token_ids": (7, 8)},
        {
            "eos_token_ids": (7, 8),
            "params": SamplingParams(ignore_eos=True, stop_token_ids=[3, 7]),
        },
        {
            "eos_token_ids": (7, 8),
            "params": SamplingParams(stop_token_ids=[3, 7, 3]),
        },
    ):
        one = make_request(**fields)
        assert one.sample_id and one.stop_token_ids is not None
    one = make_request(token_ids=[1, 2, 3], output_token_ids=[4, 5], max_tokens=3)
    for num_computed in (0, 2, 4, 5, 6):
        one.num_computed_tokens = num_computed
        for one.max_tokens in (3, 4):
            assert one.num_tokens == 5 and one.num_uncomputed_tokens >= 0
    for places in ((), (2,), (1, 4), (3, 5), (0, 2), (4, 9)):
        one.get_token_ids(*places)
    for fields, stop in (
        ({}, None),
        ({"max_tokens": 2}, None),
        ({"max_tokens": 40, "eos_token_ids": (ids[3],)}, None),
        ({"max_tokens": 40}, ["kite"]),
    ):
        params = SamplingParams(temperature=0, stop=stop, logprobs=1)
        one = make_request(
            params=params,
            detokenizer=m.IncrementalDetokenizer(token_bytes, params),
            **({"max_tokens": 6} | fields),
        )
        one.num_computed_tokens = 1
        one.start()
        one.start(9.0)
        entry = [(ids[0], -0.5, 1), (ids[1], -1.5, 2)]
        one.take_prompt_logprobs(1, [entry, entry[::-1]])
        one.take_prompt_logprobs(2, [entry[:1]])
        one.take_prompt_logprobs(1, [entry[1:]])
        for token_id in ids:
            one.append_token(SampledToken(token_id, [(token_id, -0.25, 1)]), 10.0)
            assert isinstance(one.text, str)
            if one.status.is_finished:
                break
            if len(one.output_token_ids) == 3:
                one.output_token_ids.append(9)  # half of a token: it broke off
                one.logprobs.append(one.logprobs[0])
                one.rewind()
        attempt(one.append_token, SampledToken(1), 11.0)
        one.rewind()
        one.finish(m.RequestStatus.FINISHED_ABORTED)
    for status in (m.RequestStatus.FINISHED_ABORTED, m.RequestStatus.FINISHED_ERROR):
        one = make_request()
        assert one.text == ""
        one.append_token(SampledToken(4), 1.0)
        one.finish(status, "words", 2.0)


def make_engine(**options: Any) -> Any:
    """An engine with a small random model, which needs no tokenizer."""
    from folo_lib.engine import LLMEngine

    model = make_model(vocab_size=20)
    share(model)
    options = {"max_model_len": 32, "block_size": 4, "use_tqdm": False} | options
    given: dict[str, Any] = {
        "kv_cache_memory_bytes": 2 * 3 * 2 * 8 * 4 * 4 * 14,
        "seed": 1,
    }
    return LLMEngine(model, **(given | options))


def run_engine(engine: Any, prompts: list[list[int]], **fields: Any) -> None:
    """Runs prompts to their end, the second half of them when the first has begun."""
    from folo_lib.sampling_params import SamplingParams

    given: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
    params = SamplingParams(**(given | fields))
    half = max(1, len(prompts) // 2)
    for i, prompt in enumerate(prompts[:half]):
        engine.add_request(prompt, params, f"r{i}")
    engine.step()
    for i, prompt in enumerate(prompts[half:], half):
        engine.add_request(prompt, params, f"r{i}")
    steps = 0
    while engine.has_unfinished_requests() and steps < 200:
        engine.step()
        engine.stats()
        steps += 1
        if steps == 2:
            engine.abort_request("r1")


PROMPTS = [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5], [7] * 11, [1, 2, 3, 4, 6, 6]]


def engine(m: ModuleType) -> None:
    from folo_lib.runner import SampledToken, StepOutput

    one = make_request(output_token_ids=[8], num_computed_tokens=2, index=3, seed=5)
    m.describe_request(one)
    run_engine(make_engine(scheduler="fcfs"), PROMPTS, prompt_logprobs=1, logprobs=1)
    run_engine(make_engine(scheduler="fcfs", async_scheduling=True), PROMPTS[:2])
    engine_ = make_engine(scheduler="fcfs")
    scheduler, table = engine_.scheduler, engine_._table
    requests = [make_request(name) for name in "abc"]
    table.add([[request] for request in requests], m.Inbox(every_token=True))
    m.run_step(engine_.executor, table)
    scheduler.finish(requests[1])
    scheduler.finish(requests[1])
    scheduler.reset([requests[0], requests[2]])
    scheduler.get_stats()
    scheduler.schedule()
    scheduler.get_stats()
    inbox = m.Inbox(every_token=False)
    others = m.RequestTable(scheduler)
    first, second, third = (make_request(name, num_starts=1) for name in "xyz")
    others.add([[first], [second], [third]], inbox)
    tokens = {"x-0": SampledToken(4), "y-0": SampledToken(-1), "z-0": SampledToken(2)}
    output = StepOutput(tokens, {"x-0": (1, [[(2, -0.5, 1)]])})
    starts = {first: 1, second: 1, third: 0}
    m.take_outputs(others, starts, output, engine_.executor)
    m.take_outputs(others, starts, StepOutput({}, {}), engine_.executor)

    class Broken:
        """An executor whose device fails."""

        def __init__(self, error: BaseException) -> None:
            self.error, self.num_resets = error, 0

        def launch(self, plan: Any) -> Any:
            raise self.error

        def reset(self) -> None:
            self.num_resets += 1

    for error in (RuntimeError("the device"), KeyboardInterrupt()):
        table = m.RequestTable(m.FCFSScheduler(scheduler.config, 8))
        table.add([[make_request("p")], [make_request("q")]], inbox)
        with contextlib.suppress(KeyboardInterrupt):
            m.run_step(Broken(error), table)
        with (
            contextlib.suppress(KeyboardInterrupt),
            m.undisturbed(Broken(error), table, BaseException, []),
        ):
            raise KeyboardInterrupt
        with m.undisturbed(Broken(error), table, BaseException, []):
            pass


def scheduler(m: ModuleType) -> None:
    from folo_lib.config import EngineConfig

    for kv_cache, blocks, budget, seqs in (
        ("simple", 40, 8, 4),
        ("simple", 7, 16, 3),
        ("paged", 8, 6, 2),
        ("paged", 30, 64, 8),
    ):
        config = EngineConfig(
            block_size=4,
            max_num_batched_tokens=budget,
            max_num_seqs=seqs,
            device="cpu",
            dtype="float32",
        )
        made = m.ContinuousScheduler(config, blocks, kv_cache)
        requests = [
            make_request(f"r{i}", prompt, max_tokens=8)
            for i, prompt in enumerate(PROMPTS)
        ]
        run_dry(made, requests)
    made.add(make_request("s", [1] * 5))
    made.add(make_request("t", [1] * 5))
    made.schedule()
    made.reset([*made.running, *made.waiting])
    made.schedule()


def run_dry(scheduler: Any, requests: list[Any]) -> None:
    """Runs requests to their ends without a model: each token is the step's number."""
    by_id = {request.sample_id: request for request in requests}
    for request in requests[:2]:
        scheduler.add(request)
    for step in range(60):
        if step == 1:
            for request in requests[2:]:
                scheduler.add(request)
        if step == 4:
            scheduler.finish(requests[1])
        if not scheduler.has_unfinished():
            break
        plan = scheduler.schedule()
        scheduler.get_stats()
        for one in plan.scheduled:
            request = by_id[one.request_id]
            if request.num_computed_tokens < request.num_tokens:
                continue
            request.output_token_ids.append(step)
            if len(request.output_token_ids) >= request.max_tokens:
                scheduler.finish(request)


def block_pool(m: ModuleType) -> None:
    name = m.hash_block_tokens(b"", [1, 2, 3])
    m.hash_block_tokens(name, (4, 5, 6))
    pool = m.BlockPool(5)
    taken = pool.get_new_blocks(3)
    pool.cache_block(taken[0], b"x")
    pool.cache_block(taken[1], b"y")
    pool.cache_block(taken[2], b"x")
    pool.touch([taken[0]])
    pool.free_blocks(taken)
    pool.free_blocks([taken[0]])
    pool.touch([taken[1]])
    attempt(pool.free_blocks, [4])
    attempt(pool.get_new_blocks, 9)
    pool.get_new_blocks(3)
    assert pool.num_free_blocks >= 0
    pool.get_new_blocks(1)
    from folo_lib.config import EngineConfig
    from folo_lib.scheduler import ContinuousScheduler

    for shared in (True, False):
        config = EngineConfig(
            block_size=4,
            max_num_batched_tokens=9,
            max_num_seqs=3,
            enable_prefix_caching=shared,
            device="cpu",
            dtype="float32",
        )
        made = ContinuousScheduler(config, 8)
        run_dry(made, [make_request(f"r{i}", one) for i, one in enumerate(PROMPTS)])
        again = [make_request(f"s{i}", one) for i, one in enumerate(PROMPTS)]
        run_dry(made, again[:2])
        kv_cache: Any = made.kv_cache
        kv_cache.check_integrity([])
    manager = m.PagedKVCacheManager(10, 4)
    a, b = make_request("a", [1] * 9), make_request("b", [1] * 9)
    for request in (a, b):
        manager.get_computed_blocks(request)
        manager.hash_blocks(request, 2)
        manager.allocate_slots(request, 9)
    manager.publish()
    manager.get_computed_blocks(make_request("c", [1] * 8))
    manager.get_computed_blocks(make_request("d", [1] * 9))
    manager.allocate_slots(make_request("e", [1] * 60), 60)
    a.num_computed_tokens = b.num_computed_tokens = 9
    manager.check_integrity([a, b])
    assert manager.num_used_blocks + manager.num_cached_blocks >= 0
    a.num_computed_tokens = 99
    attempt(manager.check_integrity, [a])
    manager.pool.ref_counts[7] = 2
    m.find_faults(manager.pool, [a, b], 4)
    a.num_computed_tokens = 1
    m.find_faults(manager.pool, [a, b], 4)
    manager.pool.empty.append(manager.pool.cached_blocks[a.block_hashes[0]])
    a.block_hashes[0] = b"wrong"
    m.find_faults(manager.pool, [a, b], 4)
    manager.pool.cached_blocks.clear()
    m.find_faults(manager.pool, [], 4)
    manager.free(b)
    manager.free(b)
    manager.reset()


def paged_attention(m: ModuleType) -> None:
    from folo_lib.tile_sizes import DECODE, PREFILL

    cpu = torch.device("cpu")
    for num_kv_heads in (1, 2, 8):
        m.count_workers(DECODE, num_kv_heads, cpu)
        m.count_workers(PREFILL, num_kv_heads, cpu)
    for num_seqs in (1, 3, 64):
        for longest in (200, 700, 9000):
            m.count_programs(num_seqs, 12, longest, 256)


def cuda_graph(m: ModuleType) -> None:
    from folo_lib.runner import StepLayout
    from folo_lib.sampler import make_jumps

    for largest in (1, 3, 32, 64, 100, 256, 300):
        m.choose_decode_sizes(largest)
    for given in ((1, 100), (8, 64), (200, 2048)):
        sizes = m.choose_sizes(*given)
    for given in ((1, 1), (5, 5), (1, 9), (3, 70), (200, 200), (201, 201), (1, 9999)):
        m.find_size(sizes, *given)
    static = m.StaticInputs(
        [m.GraphSize(2, 2, True), m.GraphSize(3, 8, False)], 9, torch.device("cpu")
    )
    for size in (m.GraphSize(2, 2, True), m.GraphSize(3, 8, False)):
        static.count_numbers(size)
        static.split(size)
    step = StepLayout(
        input_ids=[5, 6, 7],
        positions=[0, 1, 4],
        slots=[8, 9, 2],
        query_lens=[2, 1],
        seq_lens=[2, 5],
        rows=[3, 1],
    )
    static.load(step, m.GraphSize(3, 8, False))
    one = StepLayout(
        input_ids=[4], positions=[3], slots=[7], query_lens=[1], seq_lens=[4], rows=[2]
    )
    static.load(one, m.GraphSize(2, 2, True))
    logits = torch.randn(3, 20)
    logits[2, 4] = float("nan")
    floats = torch.rand(5, 6, dtype=torch.float64) + 0.5
    floats[1, 0] = 0
    ints = torch.randint(100, (5, 4))
    rows, positions = torch.tensor([4, 1, 0]), torch.tensor([7, 8, 9])
    for scores in (logits, 2 * logits.flip(-1), logits.bfloat16()):
        for is_random in (False, True):
            m.draw_rows(
                scores, positions, rows, floats, ints, make_jumps(20, "cpu"), is_random
            )


def fused_decode(m: ModuleType) -> None:
    model = make_model()
    layer = model.model.layers[0]
    hidden, residual = torch.randn(2, 4, 24)
    cos, sin = model.model.rotary_emb(torch.tensor([0, 1, 2, 5]))
    qkv, _ = m.run_projection(layer, hidden, residual, cos, sin)
    caches = torch.randn(2, 3, 4, 2, 8).unbind()
    fused = m.FusedLayers(model, lambda function: function)
    fused.attend(layer, [qkv], (cos, sin), caches, make_metadata())


def tensor_parallel(m: ModuleType) -> None:
    biased = {"attention_bias": True, "num_key_value_heads": 4}
    config = make_config(num_attention_heads=8, **biased)
    shapes = {
        "q_proj.weight": [64, 24],
        "q_proj.bias": [64],
        "k_proj.weight": [32, 24],
        "v_proj.weight": [32, 24],
        "v_proj.bias": [32],
        "o_proj.weight": [24, 64],
        "o_proj.bias": [24],
        "gate_proj.weight": [40, 24],
        "up_proj.weight": [40, 24],
        "down_proj.weight": [24, 40],
        "k_norm.weight": [8],
        "input_layernorm.weight": [24],
    }
    names = {f"model.layers.1.{name}": shape for name, shape in shapes.items()}
    names |= {"model.embed_tokens.weight": [50, 24], "lm_head.weight": [50, 24]}
    for size in (1, 2, 4, 8):
        for name, shape in names.items():
            for rank in range(size):
                m.find_share(name, shape, config, rank, size)
        m.make_shard_config(config, size)
    from transformers import Qwen2Config

    divided = Qwen2Config(hidden_size=24, num_attention_heads=6, num_key_value_heads=6)
    m.find_share("k_proj.weight", [24, 24], divided, 1, 2)
    m.make_shard_config(divided, 2)


def benchmark(m: ModuleType) -> None:
    for values in ([3.0, 1.0, 2.0, 5.0, 9.0], [1.0, 1.0], [0.5, 0.1, 0.2, 0.4]):
        m.summarize(values)
    good = m.Reference([1, 2], [3, 4, 5, 6], [1.0, 0.9, 1e-9, 2.0], 2e-4, 4.0)
    cases = (good, torch.float32), (good, torch.bfloat16)
    for fields in ({"error": 1e-2}, {"error": float("nan")}, {"margins": [0.0] * 4}):
        worse = m.Reference(**(vars(good) | fields))
        cases += (worse, torch.float32), (worse, torch.bfloat16)  # type: ignore[assignment]
    for reference, dtype in cases:
        with contextlib.suppress(m.BenchmarkError):
            m.check_reference(reference, dtype)

    class Scripted:
        """A system whose answers are known."""

        name = "scripted"

        def __init__(self, token_ids: list[int]) -> None:
            self.token_ids = token_ids

        def generate(self, prompt: list[int], num_tokens: int) -> Any:
            return m.Run((self.token_ids * 2)[len(prompt) - 2 :][:num_tokens], 0.1, 0.2)

    for answer in ([3, 4, 5, 6], [3, 4, 9, 6], [3, 9, 5, 6]):
        with contextlib.suppress(m.BenchmarkError):
            m.check_tokens(Scripted(answer), good)
    for tied in (True, False):
        config = make_config(tie_word_embeddings=tied)
        m.weight_bytes_per_step(config, torch.bfloat16)
        m.step_bytes(config, torch.float32, 100)
