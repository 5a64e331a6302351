"""The yardstick is right: it is GPT-2, cached and uncached."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks.handwritten_gpt2 import HandwrittenGPT2
from benchmarks.measure import Timing, alternate, describe_machine, print_table, ratio, roofline


def reference() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=32, n_embd=48, n_layer=3, n_head=4, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def handwritten(source: GPT2LMHeadModel) -> HandwrittenGPT2:
    """The same model with the weights of `source`, whose linear layers hold their weights transposed."""
    model = HandwrittenGPT2(vocab_size=97, max_positions=32, hidden=48, layers=3, heads=4)
    given = source.transformer.state_dict()
    weights = {
        "word_embedding.weight": given["wte.weight"],
        "position_embedding.weight": given["wpe.weight"],
    }
    for kind in ("weight", "bias"):
        weights[f"final_norm.{kind}"] = given[f"ln_f.{kind}"]
        for i in range(3):
            q, k, v = given[f"h.{i}.attn.c_attn.{kind}"].chunk(3, dim=-1)
            weights |= {
                f"layers.{i}.attention_norm.{kind}": given[f"h.{i}.ln_1.{kind}"],
                f"layers.{i}.mlp_norm.{kind}": given[f"h.{i}.ln_2.{kind}"],
                f"layers.{i}.attention.query.{kind}": q.T if kind == "weight" else q,
                f"layers.{i}.attention.key.{kind}": k.T if kind == "weight" else k,
                f"layers.{i}.attention.value.{kind}": v.T if kind == "weight" else v,
            }
            for ours, theirs in (("attention.output", "attn.c_proj"), ("up", "mlp.c_fc"), ("down", "mlp.c_proj")):
                tensor = given[f"h.{i}.{theirs}.{kind}"]
                weights[f"layers.{i}.{ours}.{kind}"] = tensor.T if kind == "weight" else tensor
    model.load_state_dict(weights)
    return model.eval()


def test_logits_and_gradients_equal_those_of_transformers() -> None:
    source = reference()
    model = handwritten(source)
    ids = torch.randint(0, 97, (2, 11))
    want, got = source(ids).logits, model(ids)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    want.square().mean().backward()
    got.square().mean().backward()
    torch.testing.assert_close(
        model.word_embedding.weight.grad, source.transformer.wte.weight.grad, rtol=1e-3, atol=1e-4
    )


def test_cached_decoding_equals_the_full_forward() -> None:
    model = handwritten(reference())
    ids = torch.randint(0, 97, (2, 32))
    full = model(ids)
    logits, cache = model.prefill(ids[:, :5])
    steps = [logits] + [model.decode(ids[:, i : i + 1], cache) for i in range(5, 32)]
    assert cache.length == 32
    torch.testing.assert_close(torch.cat(steps, dim=1), full, rtol=1e-4, atol=1e-4)


def test_decoding_wants_one_token_and_room_for_it() -> None:
    model = handwritten(reference())
    ids = torch.randint(0, 97, (1, 4))
    with pytest.raises(ValueError, match="does not fit"):
        model.prefill(ids, capacity=3)
    _, cache = model.prefill(ids, capacity=5)
    with pytest.raises(ValueError, match="one token at a time"):
        model.decode(ids, cache)
    model.decode(ids[:, :1], cache)
    with pytest.raises(ValueError, match="with room"):
        model.decode(ids[:, :1], cache)


def test_gpt2_small_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = HandwrittenGPT2(vocab_size=50257, max_positions=1024, hidden=768, layers=12, heads=12)
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808


def test_candidates_alternate_in_balanced_order() -> None:
    calls: list[str] = []
    timings = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=4, warmup=1)
    assert "".join(calls) == "ab" + "abbaabba"
    assert [len(timing.seconds) for timing in timings.values()] == [4, 4]


def test_the_ratio_is_the_median_of_the_ratios_within_rounds() -> None:
    # the machine slowed down tenfold in the last round: the ratio does not notice
    a, b = Timing((2.0, 2.2, 20.0)), Timing((1.0, 1.0, 10.0))
    assert ratio(a, b) == pytest.approx(2.0)
    assert (a.median, a.min, a.max) == (2.2, 2.0, 20.0)


def test_the_report_names_the_machine_and_the_ratios(capsys: pytest.CaptureFixture[str]) -> None:
    assert f"torch {torch.__version__}" in describe_machine()
    limits = roofline(matrices=1, rounds=1)
    assert limits.gflops > 0
    assert limits.gigabytes_per_second > 0
    assert limits.linear_gigabytes_per_second > 0
    print_table("forward", {"ours": Timing((0.003,)), "hand": Timing((0.002,))}, baseline="hand")
    printed = capsys.readouterr().out
    assert "ours" in printed
    assert "1.500" in printed
