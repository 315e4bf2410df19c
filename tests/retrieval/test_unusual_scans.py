"""Searching by a scan that is not in HU: held back, unless the user says how to read it."""

import numpy as np
import page_service
import pytest
from scans import chest_hu, save

from ctclip import checkpoint as checkpoints
from ctclip import cli
from ctclip.data.problems import VolumeError
from ctclip.evaluation.scanner import Scanner
from ctclip.retrieval import intake, similar


def test_a_search_by_a_scan_that_is_not_hu_is_refused_until_it_is_told(archive, tmp_path, capsys):
    folder, page = archive
    scorer = Scanner(checkpoints.load(folder / "model.safetensors"))
    plain = save(tmp_path / "plain.nii.gz")
    offset = save(tmp_path / "offset.nii.gz", chest_hu() + np.int16(1024))

    def search(scan, **told):
        config = similar.SimilarConfig(
            table=page.table, scan=scan, cohort=page.cohort, out=tmp_path / "out", **told
        )
        return [(hit.study_id, round(hit.similarity, 4)) for hit in similar.run(config, scorer)]

    with pytest.raises(VolumeError, match="--rescale 1 -1024") as error:
        search(offset)
    assert error.value.code == "hu-offset"
    assert search(offset, rescale=(1.0, -1024.0)) == search(plain)
    assert search(offset, accept=("hu-offset",)) != search(plain)
    command = [f"--table={page.table}", f"--ckpt={folder / 'model.safetensors'}"]
    with pytest.raises(SystemExit):
        cli.similar([*command, f"--scan={offset}"])
    assert "--accept hu-offset" in capsys.readouterr().err
    cli.similar([*command, f"--scan={offset}", "--rescale", "1", "-1024"])


def test_an_upload_that_is_not_hu_is_refused_with_its_reason(tmp_path):
    def upload(name, hu):
        folder = tmp_path / name
        source = save(folder / "source.nii.gz", hu)
        scan = intake.prepare(source, folder, page_service.VOLUMES, intake.Limits(read_s=60))
        assert scan.hu.shape == page_service.VOLUMES.size
        return [warning["code"] for warning in scan.warnings]

    assert upload("chest", chest_hu()) == []
    with pytest.raises(intake.UploadError, match="windowed to 8 bits") as error:
        upload("windowed", np.clip((chest_hu() + 1000) / 8, 0, 255).astype(np.uint8))
    assert error.value.code == "8-bit"
    assert "--" not in str(error.value)
    assert upload("slab", chest_hu((12, 44, 64))) == ["partial-chest"]
