import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ctclip.data.resample import resample, resampled_affine


def run(hu, source, target, size, antialias=False):
    return resample(
        hu, source, target, size, clip_hu=(-1024, 3071), fill_hu=-1000, antialias=antialias
    )


@pytest.mark.parametrize(
    ("shape", "source", "target"),
    [
        ((20, 30, 26), (2.0, 0.9, 0.8), (1.5, 0.75, 0.75)),
        ((30, 24, 22), (1.0, 0.5, 0.7), (1.5, 0.75, 0.75)),
        ((9, 40, 40), (5.0, 0.4, 0.4), (1.5, 0.75, 0.75)),
    ],
)
def test_equals_torch_trilinear_before_cropping(shape, source, target):
    hu = np.random.default_rng(0).integers(-1000, 1000, shape).astype(np.int16)
    size = tuple(int(n * s / t) for n, s, t in zip(shape, source, target, strict=True))
    expected = F.interpolate(
        torch.from_numpy(hu)[None, None].double(), size=size, mode="trilinear", align_corners=False
    )[0, 0]
    assert np.abs(run(hu, source, target, size) - expected.numpy()).max() <= 0.501


def test_equals_torch_antialiased_resizing_within_a_slice():
    hu = np.random.default_rng(0).integers(-1000, 1000, (8, 61, 47)).astype(np.int16)
    expected = F.interpolate(
        torch.from_numpy(hu)[None].double(), size=(20, 15), mode="bilinear", antialias=True
    )[0]
    got = run(hu, (1.0, 1.0, 1.0), (1.0, 61 / 20, 47 / 15), (8, 20, 15), antialias=True)
    assert np.abs(got - expected.numpy()).max() <= 0.51


def test_crops_and_pads_about_the_centre():
    hu = np.arange(10 * 12 * 14, dtype=np.int16).reshape(10, 12, 14)
    out = run(hu, (1.0,) * 3, (1.0,) * 3, (14, 6, 14))
    assert np.array_equal(out[2:12], hu[:, 3:9])
    assert (out[:2] == -1000).all()
    assert (out[12:] == -1000).all()


def test_a_spacing_that_a_header_rounds_makes_the_same_volume():
    hu = np.random.default_rng(0).integers(-1000, 1000, (40, 4, 4)).astype(np.int16)
    size = (30, 4, 4)
    exact, rounded = ((step, 1.0, 1.0) for step in (0.9, float(np.float32(0.9))))
    assert rounded < exact
    assert np.array_equal(
        run(hu, rounded, (1.5, 1.0, 1.0), size), run(hu, exact, (1.5, 1.0, 1.0), size)
    )


def test_padding_and_metal_do_not_bleed_into_neighbours():
    hu = np.full((8, 8, 8), 40, dtype=np.int16)
    hu[:, :, :4] = -8192
    out = run(hu, (1.0, 1.0, 1.0), (1.0, 1.0, 0.8), (8, 8, 10))
    assert out.min() == -1024
    assert set(np.unique(out[:, :, 5:])) <= set(range(-1024, 41))
    assert out[0, 0, 4] > -1000


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("scanner_mm", [(0.5, 0.5, 0.5), (1.0, 0.7, 0.7), (2.5, 0.9, 0.9)])
def test_a_nodule_keeps_its_size_in_mm(scanner_mm, antialias):
    shape = tuple(int(40 / mm) for mm in scanner_mm)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1)
    centre = (np.array(shape) - 1) / 2
    inside = (((grid - centre) * scanner_mm) ** 2).sum(-1) < 10**2
    hu = np.where(inside, 1000, -1000).astype(np.int16)
    out = run(hu, scanner_mm, (1.5, 0.75, 0.75), (24, 50, 50), antialias).astype(float)
    volume_mm3 = ((out + 1000) / 2000).sum() * 1.5 * 0.75**2
    assert volume_mm3 == pytest.approx(4 / 3 * np.pi * 10**3, rel=0.05)


def test_antialiasing_averages_noise_that_interpolation_would_keep():
    noise = np.random.default_rng(0).normal(0, 100, (60, 60, 60)).astype(np.float32)
    smooth = run(noise, (1.0,) * 3, (3.0,) * 3, (20,) * 3, antialias=True)
    plain = run(noise, (1.0,) * 3, (3.0,) * 3, (20,) * 3)
    assert smooth.std() < 25
    assert plain.std() > 60


def test_input_is_left_unchanged():
    hu = np.full((8, 8, 8), 5000, dtype=np.int16)
    run(hu, (1.0,) * 3, (2.0,) * 3, (4, 4, 4))
    assert (hu == 5000).all()


def test_affine_carries_the_half_voxel_shift():
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    moved = resampled_affine(affine, (10, 10, 10), (2.0,) * 3, (1.0,) * 3, (20, 20, 20))
    assert np.allclose(np.diag(moved), 1.0)
    assert np.allclose(moved[:3, 3], -0.5)
