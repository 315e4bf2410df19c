import numpy as np
import pytest
from bad_scans import CASES
from dicoms import write_series
from PIL import Image
from rich.console import Console
from scans import chest_hu, save

from ctclip.data.dicom import find_series
from ctclip.data.inspect import inspect, render, save_picture


def screen(result):
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(result))
    return console.export_text()


def test_a_good_scan_shows_its_facts_and_is_usable(tmp_path):
    result = inspect(save(tmp_path / "scan.nii.gz", axes="RAS"))
    shown = screen(result)
    assert result.is_usable
    assert "36 x 44 x 64" in shown
    assert "8.000 x 6.000 x 5.000 mm" in shown
    assert "stored RAS, read as SPL" in shown
    assert shown.strip().endswith("usable")


def test_a_bad_scan_gives_its_reason_and_a_held_one_its_remedy(tmp_path):
    (tmp_path / "bad.nii.gz").write_bytes(b"nothing")
    bad = inspect(tmp_path / "bad.nii.gz")
    assert not bad.is_usable
    assert "refused: " in screen(bad)
    assert "[not-nifti]" in screen(bad)
    held = inspect(save(tmp_path / "held.nii.gz", chest_hu() + 1024))
    assert not held.is_usable
    assert "--rescale 1 -1024" in screen(held)
    assert inspect(tmp_path / "held.nii.gz", rescale=(1, -1024)).is_usable
    with pytest.raises(ValueError, match="could not be read"):
        save_picture(bad, tmp_path / "x.png")


def test_how_the_scan_is_stored_is_on_the_screen(tmp_path):
    hu = np.where(chest_hu() < -990, np.int16(-2048), chest_hu())
    shown = screen(inspect(save(tmp_path / "a.nii.gz", hu, axes="LAS")))
    assert "note  stored left-handed" in shown
    assert "% is padding (down to -2048); becomes air" in shown
    reformat = inspect(save(tmp_path / "b.nii.gz", spacing_mm=(4.0, 9.0, 4.0)))
    assert "a coronal or sagittal reformat" in screen(reformat)
    (tmp_path / "c.nii").write_bytes(CASES["oblique"][1]())
    assert "degrees off the body's axes" in screen(inspect(tmp_path / "c.nii"))


def test_a_dicom_folder_lists_its_series(tmp_path):
    write_series(tmp_path, chest_hu((24, 24, 32)), series="1.7")
    assert "1.7 (24 slices)" in screen(inspect(tmp_path))


@pytest.mark.parametrize("text", ["None", "", " n/a "])
def test_a_header_that_spells_out_none_says_nothing(tmp_path, text):
    def anonymised(_, dataset):
        dataset.SeriesDescription = dataset.ManufacturerModelName = text
        dataset.Manufacturer = "Siemens"

    write_series(tmp_path, chest_hu((24, 24, 32)), series="1.7", edit=anonymised)
    assert "1.7 (24 slices)" in screen(inspect(tmp_path))
    (one,) = find_series(tmp_path)
    assert one.slices[0].meta == {"manufacturer": "Siemens"}


def test_the_picture_shows_head_up_and_the_patients_left_on_the_right(tmp_path):
    hu = chest_hu()
    hu[28:, 8:14, 46:52] = 3000  # a mark: high, in front, left
    picture = save_picture(inspect(save(tmp_path / "scan.nii.gz", hu)), tmp_path / "a/p.png")
    image = Image.open(picture).convert("L")
    assert image.size == (960, 640)


def test_nothing_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        inspect(tmp_path / "gone.nii.gz")
