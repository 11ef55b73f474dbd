"""Cost: counts against counting by hand, against PyTorch's counter and against the real step; hours are arithmetic."""
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from far_nb.acr import ACR
from far_nb.core import FarError
from far_nb.cost import Account, largest_batch, network_cost, networks_of, step_cost, training_hours, visible_tokens
from far_nb.discriminator import PatchDiscriminator
from far_nb.experiments import PRESETS, get_preset
from far_nb.far import FAR
from far_nb.mae import MAE, MAEConfig
from far_nb.masks import patch_mask
from far_nb.speed import peak_memory, training_step
from far_nb.training import hr_sizes

SMOKE = get_preset("smoke")
SMALL = replace(SMOKE, perceptual="none", acr=replace(SMOKE.acr, masked_position=False), mae_train=replace(SMOKE.mae_train, batch_size=3))


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9), st.integers(4, 20), st.integers(1, 3))
def test_a_convolution_and_a_product_are_counted_as_by_hand(batch, inputs, outputs, side, kernel):
    with torch.device("meta"), Account() as account: nn.Conv2d(inputs, outputs, kernel)(torch.empty(batch, inputs, side, side))
    assert dict(account.flops) == {"convolution": 2 * batch * inputs * outputs * kernel ** 2 * (side - kernel + 1) ** 2}
    with torch.device("meta"), Account() as account: torch.empty(batch, inputs) @ torch.empty(inputs, outputs)
    assert dict(account.flops) == {"product": 2 * batch * inputs * outputs}


def test_a_real_fourier_transform_costs_half_a_complex_one():
    signal = torch.randn(3, 16, 16)
    with Account() as account: torch.fft.rfft2(signal)
    assert account.flops["Fourier"] == 2.5 * 3 * 256 * 8 == account.total
    with Account() as account: torch.fft.irfft2(torch.fft.rfft2(signal), s=(16, 16))
    assert account.flops["Fourier"] == 2 * 2.5 * 3 * 256 * 8
    with Account() as account: torch.fft.fft2(signal.to(torch.complex64))
    assert account.flops["Fourier"] == 5 * 3 * 256 * 8


def test_agrees_with_pytorch_s_counter_forward_and_backward():
    network, picture = PatchDiscriminator(8), torch.randn(2, 3, 32, 32)
    run = lambda: network(picture)[0].sum().backward()
    with Account() as account: run()
    with FlopCounterMode(display=False) as counter: run()
    assert account.total == counter.get_total_flops() > 0


def test_peak_is_what_is_alive_at_one_time():
    with torch.device("meta"), Account() as account:
        one = torch.empty(1000)
        del one
        two = torch.empty(500); three = two.view(50, 10).t()            # a view takes nothing
        four = two + three.reshape(-1)
    assert account.peak == 4 * 1500 and account.live == 4 * 1000      # two, the copy that reshape makes, and four; then the copy is gone


@pytest.fixture(scope="module")
def real_step():
    "A real training step of FAR: its account, its allocator's peak, and the longest row of visible tokens."
    torch.manual_seed(0)
    far, critic, config = FAR(MAE(SMALL.mae), ACR(SMALL.acr)), PatchDiscriminator(SMALL.discriminator_width), SMALL.far_train
    images, masks = torch.rand(config.batch_size, 3, 64, 64), torch.zeros(config.batch_size, 1, 64, 64)
    for index in range(config.batch_size): masks[index, :, :16 + 8 * index, :40] = 1
    step = training_step(far, critic, None, config, images, masks)
    step()
    with Account() as account: step()
    return account, peak_memory(step), int((~patch_mask(masks, SMALL.mae.grid)).flatten(1).sum(1).max())


def test_counted_on_shapes_as_in_a_real_step_of_far(real_step):
    account, allocated, longest = real_step
    counted = step_cost(SMALL, "far", visible=longest)
    assert counted.total == pytest.approx(account.total, rel=0.01)
    assert counted.working == pytest.approx(allocated, rel=0.25)
    assert list(counted.flops) == ["MAE", "FAR forward", "judges", "backward", "discriminator"] and all(counted.flops.values())


def test_counted_on_shapes_as_in_a_real_step_of_the_mae():
    mae, tokens = MAE(SMALL.mae), SMALL.mae.grid ** 2
    token_mask = torch.zeros(3, tokens, dtype=torch.bool)
    token_mask[:, :48] = True
    with Account() as account: mae.loss(torch.rand(3, 3, 64, 64), token_mask).backward()
    assert step_cost(SMALL, "mae").total == pytest.approx(account.total, rel=0.01)


def test_cost_grows_as_it_must():
    cost = lambda stage, **options: step_cost(SMALL, stage, visible=40, **options)
    one, four, large = cost("far", batch=1), cost("far", batch=4), cost("far", batch=1, size=128)
    assert four.total == 4 * one.total and four.weights == one.weights and four.optimiser == one.optimiser
    assert large.flops["MAE"] == one.flops["MAE"] and 3.5 < large.flops["FAR forward"] / one.flops["FAR forward"] < 4.2
    assert 3 < (cost("far", batch=8).working - four.working) / (cost("far", batch=5).working - four.working) < 5
    average = step_cost(replace(SMALL, far_train=replace(SMALL.far_train, ema=0.9)), "far", batch=1, visible=40)
    assert average.optimiser - one.optimiser == 4 * sum(p.numel() for p in networks_of(SMALL).acr.parameters())
    with pytest.raises(FarError, match="stage"): step_cost(SMALL, "other")


def test_the_paper_s_batch_costs_this_machine_nothing():
    "Half a terabyte of activations would not go unnoticed."
    cost = step_cost(get_preset("paper"), "mae")
    assert cost.batch == 512 and cost.memory > 50e9 and cost.weights == 4 * 111_982_592


def test_parts_of_far_add_up():
    lines = network_cost(SMALL)
    assert sum(lines[part]["parameters"] for part in lines if part != "discriminator") == sum(
        p.numel() for network in (networks_of(SMALL).mae, networks_of(SMALL).acr) for p in network.parameters())
    whole = step_cost(SMALL, "far", batch=1, visible=16)
    assert whole.flops["FAR forward"] == sum(lines[part]["flops"] for part in ("prior pyramid", "prior attention, twice", "restoration network (LaMa)"))


def test_visible_tokens_are_those_of_the_longest_row():
    few, many = visible_tokens(SMALL, 1), visible_tokens(SMALL, 32)
    assert 0 < few < many < SMALL.mae.grid ** 2
    assert visible_tokens(SMALL, 10_000) >= many


def test_largest_batch_fits_and_the_next_does_not():
    for stage, preset in (("mae", replace(SMALL, mae_train=replace(SMALL.mae_train, batch_size=16))), ("far", SMALL)):
        batch = largest_batch(preset, stage, 0.1)
        assert batch > 1
        assert step_cost(preset, stage, batch=batch).memory <= 0.1e9 * 1.05
        assert step_cost(preset, stage, batch=batch + 1).memory > 0.1e9 * 0.95
    assert largest_batch(SMALL, "mae", 1e-6) == 0


def test_hours_are_arithmetic():
    measured = training_hours(SMALL, images_per_s={"mae": 2, "far": 4, "hr": 8})
    assert {name: line["pictures"] for name, line in measured.items()} == {"mae": 20 * 3, "far": 10 * 4, "hr": 4 * 2}
    assert measured["far"]["hours"] == 40 / 4 / 3600
    counted, double = training_hours(SMALL, flops_per_s=1e9), training_hours(SMALL, flops_per_s=1e9, gpus=2)
    assert counted["mae"]["flops"] == 20 * step_cost(SMALL, "mae").total and counted["mae"]["hours"] == counted["mae"]["flops"] / 1e9 / 3600
    assert all(double[name]["hours"] == counted[name]["hours"] / 2 for name in counted)
    sizes = hr_sizes(SMALL.image_size, SMALL.hr_size, SMALL.hr_step)
    mean = sum(step_cost(SMALL, "hr", size=size).total for size in sizes) / len(sizes)
    assert counted["hr"]["flops"] == pytest.approx(4 * mean, rel=0.02)
    only = training_hours(SMALL, flops_per_s=1e9, configs={"mine": ("far", replace(SMALL.far_train, steps=7))})
    assert list(only) == ["mine"] and only["mine"]["flops"] == pytest.approx(counted["far"]["flops"] * 0.7)


@pytest.mark.parametrize("options, message", [({}, "give one speed"), ({"flops_per_s": 1.0, "images_per_s": {}}, "give one speed"), ({"flops_per_s": 1.0, "gpus": 0}, "0 devices")])
def test_hours_want_one_speed(options, message):
    with pytest.raises(FarError, match=message): training_hours(SMALL, **options)
