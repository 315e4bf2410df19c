"""The page over HTTP: what it answers, and everything that it refuses."""

import csv
import gzip
import io
import json
import os
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import dicoms
import numpy as np
import page_service
import pytest

pytest.importorskip("fastapi", reason="ctclip[page] is not installed")
pytest.importorskip("httpx", reason="ctclip[dev] is not installed")
pytest.importorskip("pypdf", reason="ctclip[dev] is not installed")

from dataclasses import replace

import nibabel as nib
import pypdf
from fastapi.testclient import TestClient
from scans import chest_hu, save

from ctclip.findings import FINDINGS
from ctclip.retrieval.intake import Limits, UploadError, unpack
from ctclip.retrieval.page import SECURITY_HEADERS, ServeConfig, build, serve

OURS = {"x-ctclip": "1", "host": "127.0.0.1:8765"}
LIMITS = Limits(upload_mib=8, unpacked_mib=32, files=200, read_s=60)


@pytest.fixture(scope="module")
def service(archive):
    return page_service.open_service(*archive)


@pytest.fixture(scope="module")
def audit_log(tmp_path_factory):
    return tmp_path_factory.mktemp("audit") / "audit.jsonl"


@pytest.fixture(scope="module")
def client(service, audit_log):
    app = build(service, ServeConfig(limits=LIMITS, audit_log=audit_log))
    with TestClient(app, headers=OURS, raise_server_exceptions=False) as client:
        yield client


def ask(client, **question):
    return client.post("/api/search", content=json.dumps(question))


def upload(client, data):
    """Send a file and wait for what becomes of it."""
    answer = client.post("/api/scans", content=data)
    if answer.status_code != 200:
        return {"state": "failed", "code": answer.status_code, **answer.json()}
    for _ in range(1200):
        job = client.get(f"/api/scans/{answer.json()['job']}").json()
        if job["state"] in ("done", "failed"):
            return job
        time.sleep(0.05)
    raise AssertionError("the upload never finished")


def phantom_scan(archive):
    return next((archive[0] / "phantom").rglob("phantom_00002*.nii.gz"))


def test_a_study_of_the_archive_finds_other_patients(client, archive):
    table, _ = page_service.table_and_cohort(*archive)
    result = ask(client, study=table.study_id[0], k=50).json()

    assert len(result["hits"]) == len(set(table.patient_id)) - 1
    assert table.study_id[0] not in [hit["study"] for hit in result["hits"]]
    assert [reading["finding"] for reading in result["readings"]] == list(FINDINGS)
    similarity = [hit["similarity"] for hit in result["hits"]]
    assert similarity == sorted(similarity, reverse=True)


def test_an_uploaded_scan_of_the_archive_finds_itself_first(client, archive):
    job = upload(client, phantom_scan(archive).read_bytes())

    assert job["state"] == "done", job
    result = ask(client, scan=job["scan"], k=3).json()
    assert result["hits"][0]["volume"].startswith("phantom_00002")
    assert result["hits"][0]["similarity"] == pytest.approx(1.0, abs=1e-3)
    assert client.get(f"/api/results/{result['id']}/query/volume.nii.gz").status_code == 200


def test_uploads_leave_no_file_behind(client, service, archive, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with TestClient(build(service, ServeConfig(limits=LIMITS)), headers=OURS) as fresh:
        assert upload(fresh, phantom_scan(archive).read_bytes())["state"] == "done"
        assert upload(fresh, b"PK\x03\x04 not a zip")["state"] == "failed"
        time.sleep(0.2)
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def start_page(tmp_path):
    """A process with an upload, until its input ends; returns it with its folder."""
    code = (
        "import sys; from ctclip.retrieval.intake import Scratch; scratch = Scratch()\n"
        "(scratch.path / 'upload').touch(); print(scratch.path, flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, **pipes)
    return process, Path(process.stdout.readline().strip())


def test_a_start_clears_what_a_killed_page_left_and_nothing_of_a_living_one(tmp_path):
    killed, left = start_page(tmp_path)
    killed.kill()
    killed.communicate()
    assert (left / "upload").exists()
    living, kept = start_page(tmp_path)
    assert not left.exists()

    later, other = start_page(tmp_path)

    assert (kept / "upload").exists()
    assert (other / "upload").exists()
    for process in (living, later):
        process.communicate()
    assert list(tmp_path.iterdir()) == []


def test_a_text_and_a_filter_are_answered(client, archive):
    table, _ = page_service.table_and_cohort(*archive)
    where = {"sex": "F"}
    result = ask(client, text="bilateral pleural effusion", where=where, k=50).json()

    women = {p for p, sex in zip(table.patient_id, table.fields["sex"], strict=True) if sex == "F"}
    assert len(result["hits"]) == len(women)
    assert result["readings"] is None


def test_pictures_lie_in_one_frame(client, archive):
    table, _ = page_service.table_and_cohort(*archive)
    result = ask(client, study=table.study_id[0]).json()
    base = f"/api/results/{result['id']}"

    volume = nib.Nifti1Image.from_bytes(
        gzip.decompress(client.get(f"{base}/0/volume.nii.gz").content)
    )
    heat = nib.Nifti1Image.from_bytes(
        gzip.decompress(client.get(f"{base}/0/heat-3.nii.gz").content)
    )

    def corners(image):
        low = image.affine @ [-0.5, -0.5, -0.5, 1]
        high = image.affine @ [*(np.array(image.shape) - 0.5), 1]
        return np.array([low, high])

    assert nib.aff2axcodes(volume.affine) == ("L", "P", "S")
    np.testing.assert_allclose(corners(volume), corners(heat), atol=1e-3)
    assert client.get(f"{base}/0/thumbnail.png").content.startswith(b"\x89PNG")


def test_a_result_has_a_permanent_link_and_can_be_saved(client, archive):
    table, _ = page_service.table_and_cohort(*archive)
    result = ask(client, study=table.study_id[0], k=3).json()
    later = page_service.open_service(*archive)
    base = f"/api/results/{result['id']}"

    assert later.result(result["id"])["hits"] == result["hits"]
    for language, word in (("en", "For research only"), ("zh", "仅供研究使用")):
        text = client.get(f"{base}/result.html?language={language}").text
        assert word in text
        assert result["hits"][0]["study"] in text
        assert "http" not in text.replace("http-equiv", "")
        pdf = pdf_text(client.get(f"{base}/result.pdf?language={language}").content)
        assert pdf.count(word) >= 2
        assert all(hit["study"] in pdf for hit in result["hits"])
    assert client.get(f"{base}/result.pdf?language=<b>").status_code == 422


def test_a_saved_result_says_under_which_conditions_it_was_found(client, archive):
    table, _ = page_service.table_and_cohort(*archive)
    where = {"sex": "F", "age": [18, 90], "absent": ["Lung nodule"]}
    question = {"study": table.study_id[0], "text": "effusion", "text_weight": 0.3, "where": where}
    fresh = ask(client, **question).json()["id"]
    plain = ask(client, study=table.study_id[0]).json()["id"]

    told = {
        "en": "weight of the text 30% · Filters: absent: Lung nodule; sex: F; age: 18 - 90",
        "zh": "文字权重 30% · 筛选: 无: 肺结节; 性别: F; 年龄: 18 - 90",
    }
    for language, line in told.items():
        base = f"/api/results/{fresh}/result"
        assert line in client.get(f"{base}.html?language={language}").text
        pdf = pdf_text(client.get(f"{base}.pdf?language={language}").content)
        assert line.replace(" ", "") in pdf.replace(" ", "")
    assert "Filters" not in client.get(f"/api/results/{plain}/result.html").text


def test_what_is_doubtful_about_an_upload_stands_on_its_result(client, tmp_path, caplog):
    caplog.set_level("WARNING", "ctclip")
    job = upload(client, save(tmp_path / "slab.nii.gz", chest_hu((12, 44, 64))).read_bytes())
    assert caplog.messages == ["an upload is used with warnings: partial-chest"]

    result = ask(client, scan=job["scan"], k=2).json()

    (warning,) = result["warnings"]
    assert warning["code"] == "partial-chest"
    assert "mm from top to bottom" in warning["text"]
    for language, word in (("en", "only a part of a chest"), ("zh", "只包含部分胸部")):
        base = f"/api/results/{result['id']}/result"
        assert word in client.get(f"{base}.html?language={language}").text
        assert word in pdf_text(client.get(f"{base}.pdf?language={language}").content)
    study = result["hits"][0]["study"]
    assert ask(client, study=study, k=2).json()["warnings"] == []


def pdf_text(data):
    """All text of a PDF, without the line breaks that its columns made."""
    pages = pypdf.PdfReader(io.BytesIO(data)).pages
    return "".join(page.extract_text() for page in pages).replace("\n", "")


def test_chinese_reports_and_questions_are_legible_in_either_pdf(client, service, archive):
    """What people wrote stays in their language, whatever language the page is in."""
    table, _ = page_service.table_and_cohort(*archive)
    result = service.ask(page_parse(text="双侧胸腔积液 & <b>", study=table.study_id[0], k=2))
    result["hits"][0]["excerpt"] = "右肺上叶结节 8 mm"
    base = f"/api/results/{result['id']}"

    for language, name in (("en", "Lung nodule"), ("zh", "肺结节")):
        pdf = pdf_text(client.get(f"{base}/result.pdf?language={language}").content)
        assert "双侧胸腔积液 & <b>" in pdf
        assert "右肺上叶结节" in pdf.replace(" ", "")
        assert name.replace(" ", "") in pdf.replace(" ", "")


def test_what_people_type_is_escaped_in_a_saved_result(client, service):
    result = service.ask(page_parse(text="<script>alert(1)</script>"))
    text = client.get(f"/api/results/{result['id']}/result.html").text

    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def page_parse(**question):
    from ctclip.retrieval.service import parse

    return parse(question)


def test_the_audit_log_tells_who_saw_what_but_not_what_was_typed(client, audit_log):
    result = ask(client, text="secret words about Jane", k=2).json()
    line = json.loads(audit_log.read_text().splitlines()[-1])

    assert line["user"] == "local"
    assert line["returned"] == [hit["study"] for hit in result["hits"]]
    assert "Jane" not in audit_log.read_text()
    assert audit_log.stat().st_mode & 0o077 == 0


def test_the_audit_log_names_examples_and_who_opened_or_exported_a_result(
    client, archive, audit_log
):
    table, _ = page_service.table_and_cohort(*archive)
    more, less = list(table.study_id[:2]), [table.study_id[-1]]
    result = ask(client, more=more, less=less, k=2).json()
    base = f"/api/results/{result['id']}"
    before = len(audit_log.read_text().splitlines())
    for path in (base, f"{base}/result.html", f"{base}/result.pdf"):
        assert client.get(path).status_code == 200

    asked, *looked = map(json.loads, audit_log.read_text().splitlines()[before - 1 :])
    assert (asked["asked"]["more"], asked["asked"]["less"]) == (more, less)
    assert [line["asked"]["by"] for line in looked] == [["open"], ["html"], ["pdf"]]
    for line in looked:
        assert line["asked"]["result"] == asked["asked"]["result"] == result["id"]
        assert line["returned"] == [hit["study"] for hit in result["hits"]]


def test_logs_hold_nothing_of_a_query(client, archive, caplog):
    table, _ = page_service.table_and_cohort(*archive)
    with caplog.at_level("DEBUG", logger="ctclip"):
        ask(client, study=table.study_id[0], text="Jane Doe")
        upload(client, b"\x1f\x8b broken Jane Doe")

    assert table.study_id[0] not in caplog.text
    assert "Jane" not in caplog.text


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ({}, "nothing to search for"),
        ({"study": "nobody"}, "no case 'nobody'"),
        ({"text": "x" * 3000}, "at most 2000"),
        ({"text": "x", "k": 10**6}, "between 1 and 50"),
        ({"text": "x", "k": "many"}, "valid integer"),
        ({"text": "x", "where": {"present": ["Nonsense"]}}, "unknown finding"),
        ({"text": "x", "where": {"date": ["2020-01-01", "2021-01-01"]}}, "doesn't carry date"),
        ({"text": "x", "evil": 1}, "unknown config key evil"),
        ({"study": "a", "less": ["'; drop"] * 60}, "at most 50"),
    ],
)
def test_a_bad_question_is_refused_with_its_reason(client, question, reason):
    answer = ask(client, **question)

    assert answer.status_code == 400
    assert reason in answer.json()["detail"]


HALF = "\\ud800"
STUDY = '{"study": "phantom_00003_a", "where": '


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (STUDY + '{"hospital": ["SECRET"], "age": [0, Infinity]}}', "finite numbers"),
        (STUDY + '{"hospital": ["SECRET"], "age": [0, 1e400]}}', "finite numbers"),
        (STUDY + '{"age": [NaN, 90]}}', "finite numbers"),
        (STUDY + '{"age": [0, 1' + 400 * "0" + "]}}", "age"),
        (STUDY + f'{{"hospital": ["{HALF}"]}}}}', "half a character"),
        (STUDY + f'{{"date": ["{HALF}", "2020"]}}}}', "half a character"),
        (f'{{"text": "{HALF}"}}', "half a character"),
        (f'{{"study": "{HALF}"}}', "half a character"),
        (f'{{"{HALF}": 1}}', "half a character"),
    ],
)
def test_numbers_and_characters_that_nothing_can_hold_are_refused(client, body, reason):
    answer = client.post("/api/search", content=body)

    assert answer.status_code == 400
    assert reason in answer.json()["detail"]
    assert client.post("/login", content=f'{{"token": "{HALF}"}}').status_code == 400


def test_a_failure_is_logged_without_what_was_asked(client, service, monkeypatch, caplog):
    def broken(question):
        raise RuntimeError(f"no plan for {question}")

    monkeypatch.setattr(service, "ask", broken)
    with caplog.at_level("DEBUG"):
        answer = ask(client, text="Jane", where={"hospital": ["SECRET"]})

    assert (answer.status_code, answer.json()["code"]) == (500, "failed")
    assert "answering failed: RuntimeError" in caplog.messages
    assert "SECRET" not in caplog.text + answer.text
    assert "Traceback" not in caplog.text


def test_handles_that_name_nothing_are_not_found(client, archive):
    table, _ = page_service.table_and_cohort(*archive)
    handle = ask(client, study=table.study_id[0], k=2).json()["id"]
    for path in (
        "/api/results/nothing",
        "/api/results/..%2f..%2fmodel",
        f"/api/results/{handle}/99/volume.nii.gz",
        f"/api/results/{handle}/-1/volume.nii.gz",
        f"/api/results/{handle}/0/heat-99.nii.gz",
        "/api/scans/nothing",
    ):
        assert client.get(path).status_code == 404, path
    forgotten = ask(client, scan="gone")
    assert forgotten.status_code == 404
    assert "upload it again" in forgotten.json()["detail"]


def test_every_answer_carries_the_security_headers(client):
    for path in ("/", "/web/page.js", "/api/info", "/api/results/nothing"):
        for name, value in SECURITY_HEADERS.items():
            if name != "Cache-Control":
                assert client.get(path).headers[name] == value


def test_other_sites_can_not_use_the_page(client):
    assert client.get("/api/info", headers={"host": "evil.example"}).status_code == 421
    own = dict(OURS)
    del own["x-ctclip"]
    client.headers.pop("x-ctclip")
    try:
        assert client.post("/api/search", content="{}").status_code == 403
    finally:
        client.headers["x-ctclip"] = "1"


def test_beyond_loopback_a_token_is_demanded(service):
    with pytest.raises(ValueError, match="needs a token"):
        build(service, ServeConfig(host="0.0.0.0"))
    config = ServeConfig(host="0.0.0.0", token="a-very-long-token", allowed_hosts=("ct.local",))
    with TestClient(build(service, config), headers={**OURS, "host": "ct.local"}) as client:
        assert client.get("/").status_code == 200
        assert client.get("/api/info").status_code == 401
        assert ask(client, text="x").status_code == 401
        assert client.post("/login", content=json.dumps({"token": "wrong"})).status_code == 401
        bearer = {"authorization": "Bearer a-very-long-token"}
        assert client.get("/api/info", headers=bearer).status_code == 200
        answer = client.post("/login", content=json.dumps({"token": "a-very-long-token"}))
        cookie = answer.headers["set-cookie"].lower()
        assert "httponly" in cookie
        assert "samesite=strict" in cookie


def test_short_tokens_are_refused_and_addresses_that_work_are_printed(service, monkeypatch, capsys):
    for token in ("a", "a" * 15, "", "é" * 20):
        with pytest.raises(ValueError, match="at least 16 letters"):
            ServeConfig(token=token)
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    serve(
        service, ServeConfig(host="0.0.0.0", port=80, token="a" * 16, allowed_hosts=("CT.local",))
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "similar cases: http://127.0.0.1:80/ http://CT.local:80/" in said
    assert "serve.allowed_hosts=[name]" in said
    serve(service, ServeConfig(allowed_hosts=("proxy.local",)))
    said = capsys.readouterr().out
    assert "http://127.0.0.1:8765/" in said
    assert "proxy.local" not in said
    assert "allowed_hosts" not in said

    config = ServeConfig(host="fd00::5", token="a" * 16, allowed_hosts=("CT.local",))
    assert config.addresses == ["http://[fd00::5]:8765/", "http://CT.local:8765/"]
    with TestClient(build(service, config), headers=OURS) as client:
        for host, status in (("ct.local:8765", 200), ("[fd00::5]:8765", 200), ("x.local", 421)):
            assert client.get("/", headers={"host": host}).status_code == status


def zipped(members, **options):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, **options) as container:
        for name, data in members:
            container.writestr(name, data)
    return buffer.getvalue()


def linked():
    link = zipfile.ZipInfo("scan.dcm")
    link.external_attr = 0o120777 << 16
    return zipped([(link, "/etc/passwd")])


def lying_about_its_size():
    data = bytearray(zipped([("scan.dcm", b"\0" * (40 << 20))]))
    at = data.find(b"PK\x01\x02")
    data[at + 24 : at + 28] = struct.pack("<I", 1000)
    data[22:26] = struct.pack("<I", 1000)
    return bytes(data)


def encrypted():
    data = bytearray(zipped([("scan.dcm", b"x" * 100)]))
    data[6] |= 1
    data[data.find(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


def nifti(shape=(8, 8, 8), dtype=np.int16, **header):
    image = nib.Nifti1Image(np.zeros(shape, dtype), np.diag([10.0, 10, 10, 1]))
    for name, value in header.items():
        image.header[name] = value
    return bytearray(image.to_bytes())


def header_claiming(shape):
    data = nifti()
    data[40:56] = struct.pack("<8h", len(shape), *shape, *[1] * (7 - len(shape)))
    return bytes(data)


MALFORMED = {
    "nothing": b"",
    "text": b"hello",
    "html": b"<html><script>alert(1)</script>",
    "png": b"\x89PNG\r\n\x1a\n" + b"\0" * 500,
    "zeros": b"\0" * 5000,
    "pdf": b"%PDF-1.7" + b"\0" * 500,
    "executable": b"\x7fELF" + b"\0" * 500,
    "gzip of nothing": gzip.compress(b""),
    "gzip of text": gzip.compress(b"hello" * 100),
    "truncated gzip": gzip.compress(bytes(nifti()))[:60],
    "gzip with a broken middle": gzip.compress(bytes(nifti((20, 20, 20))))[:-8] + b"\0" * 8,
    "gzip bomb": gzip.compress(b"\0" * (30 << 20)),
    "truncated nifti": bytes(nifti())[:400],
    "nifti of one slice": bytes(nifti((8, 8, 1))),
    "nifti of constant value": bytes(nifti((30, 30, 30))),
    "nifti claiming 32767 cubed": header_claiming((32767, 32767, 32767)),
    "nifti with a negative size": header_claiming((-5, 8, 8)),
    "nifti of seven dimensions": header_claiming((2, 2, 2, 2, 2, 2, 2)),
    "nifti with nan affine": bytes(nifti((8, 8, 8), srow_x=[np.nan] * 4)),
    "nifti of an unknown type": bytes(nifti()[:70] + struct.pack("<h", 9999) + nifti()[72:]),
    "nifti offset into nowhere": bytes(nifti()[:108] + struct.pack("<f", 1e9) + nifti()[112:]),
    "broken zip": b"PK\x03\x04" + b"\0" * 100,
    "truncated zip": zipped([("a.dcm", b"x" * 1000)])[:-30],
    "empty zip": zipped([]),
    "zip of text": zipped([("readme.txt", b"hello")]),
    "zip of a zip": zipped([("inner.zip", zipped([("a", b"x")]))]),
    "zip with path traversal": zipped([("../../../../tmp/ctclip-evil", b"x")]),
    "zip with an absolute path": zipped([("/tmp/ctclip-evil", b"x")]),
    "zip with a backslash path": zipped([("..\\..\\ctclip-evil", b"x")]),
    "zip with a link": linked(),
    "encrypted zip": encrypted(),
    "zip bomb": zipped([("scan.dcm", b"\0" * (60 << 20))]),
    "zip bomb that lies": lying_about_its_size(),
    "zip of many files": zipped([(f"{n}.dcm", b"") for n in range(300)]),
    "zip with equal names": zipped([("a.dcm", b"DICM"), ("a.dcm", b"DICM")]),
    "zip with a name of 2000 letters": zipped([("a" * 2000, b"x")]),
    "zip with a null in a name": zipped([("a\0b", b"x")]),
    "dicom without content": b"\0" * 128 + b"DICM",
    "dicom of garbage": b"\0" * 128 + b"DICM" + bytes(range(256)) * 4,
    "dicom cut in a tag": b"\0" * 128 + b"DICM\x02\x00\x00\x00UL\x04\x00",
    "more than the limit": b"\x1f\x8b" + b"\0" * (9 << 20),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_forty_malformed_uploads_each_get_a_reason_and_harm_nobody(client, archive, tmp_path):
    """In one go, because each starts a reading process: the service answers after every one."""
    assert len(MALFORMED) >= 40
    for name, data in MALFORMED.items():
        job = upload(client, data)

        assert job["state"] == "failed", name
        assert job["detail"], name
        assert str(tmp_path.parent) not in job["detail"], name
        assert "Traceback" not in job["detail"], name
        assert client.get("/api/info").status_code == 200, name
    assert not (tmp_path.parents[3] / "ctclip-evil").exists()
    assert upload(client, phantom_scan(archive).read_bytes())["state"] == "done"


@pytest.mark.slow
def test_every_shared_defect_is_refused_or_read_and_harms_nobody(client, archive, test_data):
    """Real defects of NIfTI files and DICOM folders; what is tolerable may be read."""
    folder = test_data / "data" / "bad"
    with (folder / "EXPECT.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if not row["file"].startswith("csv/")]
    refused = 0
    for row in rows:
        path = folder / row["file"]
        members = sorted(path.rglob("*")) if path.is_dir() else [path]
        is_scan = path.is_file() and path.suffix in (".nii", ".gz")
        data = path.read_bytes() if is_scan else None
        if data is None:
            files = [member for member in members if member.is_file()]
            data = zipped([(member.name, member.read_bytes()) for member in files])
        job = upload(client, data)

        if row["expect"] == "error":
            assert job["state"] == "failed", row["file"]
        if job["state"] == "failed":
            refused += 1
            assert len(job["detail"]) > 10, row["file"]
            assert "Traceback" not in job["detail"], row["file"]
            assert str(folder) not in job["detail"], row["file"]
    assert refused >= 40
    assert upload(client, phantom_scan(archive).read_bytes())["state"] == "done"


def test_a_zip_of_several_series_is_refused_with_what_the_page_can_do(client, tmp_path):
    path = dicoms.folder(tmp_path, chest_hu((20, 24, 32)), series="1.2.3")
    dicoms.write_series(path, chest_hu((12, 24, 32)), series="1.2.4", prefix="other")

    job = upload(client, zipped([(file.name, file.read_bytes()) for file in path.iterdir()]))

    assert job["code"] == "several-series"
    assert "send a zip of one series" in job["detail"]
    assert "series=" not in job["detail"]
    for words in json.loads(client.get("/web/words.json").text).values():
        assert job["code"] in words["problems"]


def test_a_full_queue_says_so(service):
    config = ServeConfig(limits=replace(LIMITS, waiting=0))
    with TestClient(build(service, config), headers=OURS) as client:
        assert client.post("/api/scans", content=b"x").status_code == 429


@pytest.mark.parametrize("error", [KeyError("axis"), RuntimeError("out of memory")])
def test_an_analysis_that_breaks_ends_the_upload_and_not_the_service(
    service, archive, monkeypatch, error
):
    def broken(voxels):
        raise error

    scan = phantom_scan(archive).read_bytes()
    with TestClient(build(service, ServeConfig(limits=LIMITS)), headers=OURS) as client:
        with monkeypatch.context() as patched:
            patched.setattr(service, "analyse", broken)
            job = upload(client, scan)
        assert (job["state"], job["code"]) == ("failed", "unreadable")
        assert upload(client, scan)["state"] == "done"


def test_a_scan_that_takes_too_long_is_given_up(service, archive):
    config = ServeConfig(limits=replace(LIMITS, read_s=0.01))
    with TestClient(build(service, config), headers=OURS) as client:
        assert upload(client, phantom_scan(archive).read_bytes())["code"] == "too-slow"


def test_members_of_a_zip_are_written_under_numbers(tmp_path):
    archive = tmp_path / "a.zip"
    archive.write_bytes(zipped([("../x/é.dcm", b"1"), ("b/c", b"22")]))

    folder = unpack(archive, tmp_path / "out", LIMITS)

    assert sorted(path.name for path in folder.iterdir()) == ["000000", "000001"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "out"]


def test_a_zip_that_unpacks_to_too_much_is_stopped_while_it_unpacks(tmp_path):
    archive = tmp_path / "a.zip"
    rng = np.random.default_rng(0)
    archive.write_bytes(zipped([(str(n), rng.bytes(1 << 20)) for n in range(4)]))

    with pytest.raises(UploadError, match="more than is accepted"):
        unpack(archive, tmp_path / "out", replace(LIMITS, unpacked_mib=2))
