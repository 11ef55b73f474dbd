"""Masks: areas, token counts, reproducibility, and masked positions equal to the released code's."""
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from far_nb.core import FarError, rng
from far_nb.masks import MaskSampler, brush_mask, mae_mask, masked_position, object_mask, patch_mask

FIXTURES = Path(__file__).parent / "fixtures"
PARITY = ("official_256_astronaut", "official_256_coffee", "official_512_rocket")

many = settings(max_examples=50, deadline=None, derandomize=True)

sides = st.integers(16, 80)
ranges = st.tuples(st.floats(0.02, 0.7), st.floats(0.05, 0.25)).map(lambda pair: (pair[0], pair[0] + pair[1]))
seeds = st.integers(0, 2 ** 32)


def silhouette(seed: int) -> np.ndarray:
    "A random bool shape of a random aspect, never empty."
    generator = rng(seed)
    shape = generator.random(generator.integers(1, 60, 2)) < generator.uniform(0.05, 1)
    shape[0, 0] = True
    return shape


@many
@given(sides, sides, ranges, seeds)
def test_brush_keeps_the_area_range(height, width, area, seed):
    mask = brush_mask((height, width), rng(seed), area)
    assert mask.shape == (height, width) and mask.dtype == bool
    assert area[0] - 1e-9 <= mask.mean() <= area[1] + 1e-9


@many
@given(sides, sides, ranges, seeds)
def test_object_keeps_the_area_range(height, width, area, seed):
    mask = object_mask(silhouette(seed), (height, width), rng(seed, 1), area)
    assert mask.shape == (height, width) and mask.dtype == bool
    assert area[0] - 1e-9 <= mask.mean() <= area[1] + 1e-9


@many
@given(ranges, seeds, st.sampled_from([(1, 0, 0), (0, 1, 0), (0, 0, 1), (0.4, 0.4, 0.2)]))
def test_sampler_keeps_the_area_range_for_every_kind(area, seed, weights):
    sampler = MaskSampler(48, [silhouette(seed), silhouette(seed + 1)], area, weights)
    first, again = sampler(rng(seed, 2)), sampler(rng(seed, 2))
    assert area[0] - 1e-9 <= first.mean() <= area[1] + 1e-9
    assert (first == again).all(), "the same generator draws the same mask"


def test_masks_differ_between_seeds_and_touch_every_part_of_the_picture():
    masks = np.stack([MaskSampler(32)(rng(0, index)) for index in range(200)])
    assert len({mask.tobytes() for mask in masks}) == 200
    assert masks.mean(0).min() > 0.1


def test_kinds_follow_their_weights():
    square = np.ones((4, 4), bool)                                   # its object masks are rectangles: easy to recognise
    masks = [MaskSampler(64, [square], (0.1, 0.3))(rng(1, index)) for index in range(400)]

    def rectangle(mask):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        return mask[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1].all()
    assert abs(np.mean([rectangle(mask) for mask in masks]) - 0.4) < 0.1       # four standard errors


def test_object_mask_picks_labels_and_ignores_background():
    labels = np.zeros((40, 40), int)
    labels[2:10, 2:38] = 7                                            # wide
    labels[12:38, 4:10] = 9                                           # tall
    wide = [np.ptp(np.nonzero(mask)[1]) > np.ptp(np.nonzero(mask)[0])
            for mask in (object_mask(labels, 64, rng(2, index), (0.05, 0.1)) for index in range(40))]
    assert 5 < sum(wide) < 35


@pytest.mark.parametrize("call", [
    lambda: object_mask(np.zeros((8, 8), int), 32, rng(0)),
    lambda: object_mask(np.zeros((8, 8), bool), 32, rng(0)),
    lambda: brush_mask(32, rng(0), area=(0.5, 0.1)),
    lambda: brush_mask(32, rng(0), area=(0.5, 1.5)),
    lambda: brush_mask(4, rng(0), area=(0.01, 0.02)),                 # no whole number of 16 pixels
    lambda: MaskSampler(32, weights=(0, 0, 0)),
    lambda: MaskSampler(32, weights=(1, 1)),
])
def test_impossible_requests_are_one_line_errors(call):
    with pytest.raises(FarError) as caught: call()
    assert "\n" not in str(caught.value)


@many
@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), seeds, st.floats(0, 0.3))
def test_patch_mask_is_the_naive_maximum(batch, rows, columns, patch, seed, density):
    mask = torch.from_numpy(rng(seed).random((batch, 1, rows * patch, columns * patch)) < density)
    naive = torch.tensor([[[bool(one[0, y * patch:(y + 1) * patch, x * patch:(x + 1) * patch].any()) for x in range(columns)]
                           for y in range(rows)] for one in mask]).reshape(batch, rows, columns)
    assert torch.equal(patch_mask(mask.float(), (rows, columns)), naive)
    assert torch.equal(patch_mask(mask[:, 0], (rows, columns)), naive)
    assert torch.equal(patch_mask(mask[0, 0], (rows, columns)), naive[:1])


def test_patch_mask_refuses_a_grid_that_does_not_tile():
    with pytest.raises(FarError, match="token grid"): patch_mask(torch.zeros(1, 1, 30, 32), 8)


@many
@given(st.integers(2, 16), seeds, st.floats(0, 1), st.sampled_from(["mixed", "random"]), st.sampled_from([0.75, 0.5, 0.6]))
def test_mae_mask_has_exactly_its_share_of_tokens(grid, seed, density, kind, ratio):
    continuous = rng(seed).random((grid, grid)) < density
    masked = mae_mask(continuous, grid, rng(seed, 1), ratio, kind)
    assert masked.shape == (grid * grid,) and masked.dtype == bool
    assert masked.sum() == round(ratio * grid * grid)
    if kind == "mixed":                                               # one contains the other, whichever is larger
        assert (masked | ~continuous.ravel()).all() or (continuous.ravel() | ~masked).all()
    assert (masked == mae_mask(continuous, grid, rng(seed, 1), ratio, kind)).all()


def test_mae_mask_random_ignores_the_continuous_mask():
    hole = np.zeros((8, 8), bool); hole[:3] = True
    assert (mae_mask(hole, 8, rng(3), kind="random") == mae_mask(None, 8, rng(3), kind="random")).all()
    for wrong in (None, np.zeros((4, 4), bool)):
        with pytest.raises(FarError): mae_mask(wrong, 8, rng(3))
    with pytest.raises(FarError, match="mixed"): mae_mask(hole, 8, rng(3), kind="blocks")


@pytest.mark.parametrize("name", PARITY)
def test_masked_positions_equal_the_released_code(name):
    recorded = np.load(FIXTURES / f"{name}.npz")
    position, direct = masked_position(torch.from_numpy(recorded["mask"])[None, None] / 255)
    assert np.array_equal(position[0].numpy(), recorded["rel_pos"])
    assert np.array_equal(direct[0].numpy(), recorded["direct"])


@many
@given(st.integers(1, 3), st.integers(8, 70), st.integers(8, 70), seeds)
def test_masked_positions_of_a_batch_are_those_of_its_members(batch, height, width, seed):
    masks = torch.from_numpy(np.stack([brush_mask((height, width), rng(seed, index), (0.1, 0.4)) for index in range(batch)]))[:, None].float()
    position, direct = masked_position(masks, size=8)
    assert position.shape == (batch, height, width) and position.dtype == torch.int64
    assert direct.shape == (batch, height, width, 4) and set(direct.unique().tolist()) <= {0.0, 1.0}
    hole = masks[:, 0] > 0
    assert (position[hole] > 0).all() and not position[~hole].any() and not direct[~hole].any()
    assert (direct[hole].sum(-1) > 0).all(), "every missing cell was reached through some neighbourhood"
    for index in range(batch):
        alone = masked_position(masks[index:index + 1], size=8)
        assert torch.equal(alone[0][0], position[index]) and torch.equal(alone[1][0], direct[index])


def test_masked_positions_of_a_straight_edge():
    mask = torch.zeros(1, 1, 64, 64); mask[..., 32:] = 1              # the right half is missing
    position, direct = masked_position(mask)
    assert position[0, 10, ::2].tolist() == [0] * 16 + [8 * ring for ring in range(1, 16)] + [127]       # 16 rings are 128, clipped
    assert direct[0, 10, 40].tolist() == [1, 1, 0, 0]                 # reached from the left: up-left and down-left


def test_masks_without_a_known_cell_are_refused_also_within_a_batch():
    masks = torch.zeros(2, 1, 64, 64); masks[1] = 1
    with pytest.raises(FarError, match="nothing is known"): masked_position(masks)
    assert not masked_position(masks[:1])[0].any()
