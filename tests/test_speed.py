"""Speed: what is counted, in which order, and that a timed step is a real one. No test looks at a real clock."""
import gc
import json
import math
import time

import pandas as pd
import pytest
import torch

from far_nb.acr import ACR, ACRConfig
from far_nb.core import FarError
from far_nb.discriminator import PatchDiscriminator
from far_nb.far import FAR
from far_nb.mae import MAE, MAEConfig
from far_nb.speed import Timing, compare, inference, measure, measure_far, peak_memory, training_step
from far_nb.training import TrainConfig, train_far
from test_training import dataset

ONCE = TrainConfig(steps=1, batch_size=4)
ROWS = {"no MAE": {"prior_width": None, "attention": "none"}, "MAE": {"attention": "none"}, "MAE, attention": {}}


def build(options=None):
    torch.manual_seed(0)
    config = ACRConfig(width=8, blocks=1, grid=4, masked_position=False, **{"prior_width": 16} | (options or {}))
    mae = MAE(MAEConfig(image_size=32, patch_size=8, width=16, depth=1, heads=2, decoder_width=16, decoder_depth=1, decoder_heads=2))
    return FAR(mae if config.prior_width else None, ACR(config)), PatchDiscriminator(8)


def batch(count=4):
    items = [dataset("far")[(0, index)] for index in range(count)]
    return tuple(torch.stack([item[name] for item in items]) for name in ("image", "mask"))


def weights(*networks):
    return [tensor.clone() for network in networks for tensor in network.state_dict().values()]


def changed(before, *networks):
    return any(not torch.equal(one, other) for one, other in zip(before, weights(*networks), strict=True))


class Clock:
    "Stands still except when a function of it is called."

    def __init__(self): self.now, self.calls = 0.0, []

    def takes(self, name, *durations):
        durations = iter(durations)
        def function():
            self.calls.append(name)
            self.now += next(durations)
        return function


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_functions_take_turns_after_a_warm_up(clock):
    timings = measure({"a": clock.takes("a", 70, 80, 1, 2, 9), "b": clock.takes("b", 70, 80, 4, 4, 27)}, repeats=3, warmup=2)
    assert clock.calls == list("aabb" "ab" "ab" "ab")
    assert timings == {"a": Timing((1, 2, 9)), "b": Timing((4, 4, 27))}


def test_timing_is_the_median_with_quartiles():
    timing = Timing((5.0, 1.0, 2.0, 100.0, 3.0))
    assert (timing.low, timing.median, timing.high, timing.repeats) == (2, 3, 5, 5)


def test_ratio_is_taken_round_by_round():
    "A machine that slows down by ten between rounds: the ratio of the medians would say 30 or 3, each round says 3."
    slow, fast = Timing((3.0, 30.0, 30.0)), Timing((1.0, 10.0, 10.0))
    assert slow.over(fast) == Timing((3.0, 3.0, 3.0))
    with pytest.raises(ValueError): slow.over(Timing((1.0,)))


def test_rounds_go_on_until_the_time_is_up(clock):
    timings = measure({"a": clock.takes("a", *[2.0] * 99), "b": clock.takes("b", *[1.0] * 99)}, repeats=2, warmup=0, seconds=10)
    assert timings["a"].repeats == timings["b"].repeats == 4      # 12 s; after three rounds it was 9


def test_another_clock_is_asked_instead():
    ticks = iter(range(99))
    assert measure({"a": lambda: None}, repeats=3, warmup=0, clock=lambda: next(ticks)) == {"a": Timing((1, 1, 1))}


def test_garbage_is_not_collected_while_the_clock_runs():
    states = []
    measure({"a": lambda: states.append(gc.isenabled())}, repeats=2, warmup=1)
    assert states == [True, False, False] and gc.isenabled()
    with pytest.raises(ZeroDivisionError): measure({"a": lambda: 1 / (len(states) - 4) if states.append(0) is None else 0}, repeats=3, warmup=0)
    assert gc.isenabled()


def test_nothing_to_repeat():
    with pytest.raises(FarError, match="0 repeats: give at least 1"): measure({}, repeats=0)


def test_compare_looks_at_the_results_first():
    ones = torch.ones(3)
    found = compare(lambda: [ones, 2 * ones], lambda: [ones, 2 * ones + 2e-3], tolerance=1e-2, repeats=2, warmup=0)
    assert found["difference"] == pytest.approx(1e-3, rel=1e-3) and found["low"] <= found["times"] <= found["high"]
    with pytest.raises(FarError, match="differ by 0.001.* more than 0.0001"): compare(lambda: ones, lambda: ones + 1e-3, tolerance=1e-4)
    with pytest.raises(FarError, match="differ by nan"): compare(lambda: ones, lambda: ones * float("nan"), tolerance=1e-4)
    with pytest.raises(FarError, match=r"other shapes: \[\(3,\)\] and \[\(1, 3\)\]"): compare(lambda: ones, lambda: ones[None])


def test_compare_divides_naive_by_ours(clock):
    result = torch.ones(1)
    timed = lambda name, *durations: (lambda takes: lambda: (takes(), result)[1])(clock.takes(name, *durations))
    found = compare(timed("naive", 0, 6, 60, 8), timed("ours", 0, 2, 20, 2), repeats=3, warmup=0)
    assert "".join(name[0] for name in clock.calls) == "no" "nonono"                # the look at the results, then in turns
    assert (found["naive_s"], found["ours_s"], found["times"], found["difference"]) == (8, 2, 3, 0)


def test_peak_memory_counts_what_is_held_at_one_time():
    kept = torch.zeros(1000)
    assert peak_memory(lambda: kept.sum().item()) < 1000              # what was there before does not count
    assert peak_memory(lambda: torch.empty(25_000_000)) == 100_000_000
    assert 8_000_000 <= peak_memory(lambda: torch.zeros(1_000_000).add(1).mul(2)) < 8_001_000          # the first is gone before the third comes
    assert peak_memory(lambda: None) == 0


@pytest.mark.parametrize("config", [ONCE, TrainConfig(steps=1, batch_size=4, ema=0.9, channels_last=True, gradient_accumulation=2)])
def test_a_timed_step_is_a_step_of_training(tmp_path, config):
    far, critic = build()
    data, seen = dataset("far"), []
    original = data.__class__.__getitem__
    class Watched(data.__class__):
        def __getitem__(self, address):
            seen.append(original(self, address))
            return seen[-1]
    data.__class__ = Watched
    train_far(far, data, config, tmp_path, discriminator=critic, perceptual=None)
    other, other_critic = build()
    before = weights(other, other_critic)
    images, masks = (torch.stack([item[name] for item in seen[:4]]) for name in ("image", "mask"))
    step = training_step(other, other_critic, None, config, images, masks)
    terms, log = step(), pd.read_csv(tmp_path / "log.csv").iloc[-1]
    assert terms.keys() >= {"generator", "discriminator", "d_r1"}
    assert {name: f"{float(term):.6g}" for name, term in terms.items()} == {name: f"{log[name]:.6g}" for name in terms}
    assert not changed(weights(far, critic), other, other_critic)
    assert changed(before[:len(far.state_dict())], other) and changed(before[len(far.state_dict()):], other_critic)
    after = weights(other, other_critic)
    step()
    assert changed(after, other, other_critic)                        # each call is another step


def test_a_step_wants_the_config_s_batch():
    with pytest.raises(FarError, match="3 pictures are no batch of 4"): training_step(*build(), None, ONCE, *batch(3))


def test_inference_paints_each_picture_in_turn_and_changes_nothing():
    far, _ = build()
    images, masks = batch(2)
    far.train()
    before, paint = weights(far), inference(far, images, masks)
    assert not far.acr.training
    first, second, again = paint(), paint(), paint()
    assert first.shape == (1, 3, 32, 32) and not first.requires_grad
    assert torch.equal(first, again) and not torch.equal(first, second)
    with torch.no_grad(): torch.testing.assert_close(torch.cat([first, second]), far(images, masks), rtol=0, atol=1e-5)       # batched kernels round differently
    assert not changed(before, far)


@pytest.fixture(scope="module")
def table():
    return measure_far({row: build(options)[0] for row, options in ROWS.items()}, lambda: PatchDiscriminator(8), None, ONCE, *batch(), repeats=2, warmup=1)


def test_table_is_json_with_every_row(table):
    assert json.loads(json.dumps(table, allow_nan=False)) == table
    assert list(table["rows"]) == list(ROWS)
    for lines in table["rows"].values():
        assert [(line["metric"], line["images"]) for line in lines] == [("Training (s/batch)", 4), ("Inference (s/image)", 1)]
        for line in lines:
            assert line["protocol"] == "speed" and line["reason"] is None and (line["repeats"], line["warmup"]) == (2, 1)
            assert 0 < line["ci_low"] <= line["value"] <= line["ci_high"] and math.isfinite(line["ratio"])
    assert table["conditions"] | {"batch": 4, "image_size": 32, "dtype": "float32", "threads": torch.get_num_threads(), "perceptual": None} == table["conditions"]


def test_table_is_relative_to_its_first_row(table):
    assert [line["ratio"] for line in table["rows"]["no MAE"]] == [1, 1]


def test_memory_of_the_rows_grows(table):
    "More network, more activations; and training holds more than painting one picture."
    training, painting = ([lines[which]["peak_memory"] for lines in table["rows"].values()] for which in (0, 1))
    assert training[0] < training[1] < training[2] and painting[0] < painting[1] <= painting[2]
    assert all(step > picture for step, picture in zip(training, painting))
