import numpy as np
import pytest
from scans import chest_hu

from ctclip.data import hu
from ctclip.data.problems import VolumeError


def codes(values):
    return [note.code for note in hu.check_values("scan", values)]


def test_a_chest_is_hu():
    assert codes(chest_hu()) == []


@pytest.mark.parametrize("padding", [-2000, -2048, -3024, -8192])
def test_padding_outside_the_field_of_view_changes_nothing(padding):
    padded = chest_hu()
    padded[:, :6] = padding
    assert codes(padded) == []


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda v: v + 1024, "hu-offset"),
        (lambda v: v + 8192, "hu-offset"),
        (lambda v: np.clip((v + 1000) / 8, 0, 255).astype(np.uint8), "8-bit"),
        (lambda v: ((v + 1000.0) / 2000).astype(np.float32), "normalised"),
        (lambda v: (v / 1000.0).astype(np.float32), "normalised"),
    ],
)
def test_numbers_that_are_not_hu_are_held_back(make, code):
    notes = hu.check_values("scan", make(chest_hu()))
    assert [(note.code, note.level) for note in notes] == [(code, "hold")]


def test_the_offset_is_named_so_that_the_user_can_confirm_it():
    assert "--rescale 1 -8192" in hu.check_values("scan", chest_hu() + 8192)[0].advice


@pytest.mark.parametrize(
    ("values", "code"),
    [
        (np.full((20, 20, 20), -1024, np.int16), "constant"),
        ((chest_hu() > 0).astype(np.uint8), "label-mask"),
        (chest_hu().astype(np.int32) % 65536, "hu-out-of-range"),
    ],
)
def test_what_is_no_ct_at_all_is_refused(values, code):
    with pytest.raises(VolumeError) as error:
        hu.check_values("scan", values)
    assert error.value.code == code


def test_scaling_stays_int16_where_exact_and_never_overflows():
    stored = np.array([[[0, 1000, 4095]]], np.int16)
    assert hu.apply_scaling(stored, 1, -1024).dtype == np.int16
    assert hu.apply_scaling(stored, 1, 0) is stored
    assert hu.apply_scaling(stored, 1.5, -1024).dtype == np.float32
    limits = np.array([[[32767, -32768]]], np.int16)
    assert hu.apply_scaling(limits, 1, -1024).ravel().tolist() == [31743, -33792]


def test_nan_becomes_air_and_is_counted():
    values = chest_hu().astype(np.float32)
    values[0, 0, :5] = np.nan
    values[1, 0, 0] = np.inf
    repaired, notes = hu.replace_non_finite("scan", values)
    assert (repaired[0, 0, :5] == -1000).all()
    assert repaired[1, 0, 0] == -1000
    assert notes[0].text.startswith("6 voxels")


def test_a_zero_slope_from_a_table_is_refused():
    with pytest.raises(VolumeError, match="bad-scaling"):
        hu.rescale_once("scan", chest_hu(), (0.0, -1024.0))
