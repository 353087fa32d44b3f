"""The dates of scans, the scans of a patient in order, and their registration to the first."""

import datetime
import json
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from conftest import ROOT, make_weights, read_rows

import inference
from brainseg import phantom
from brainseg.alignment import Measured, read_flair
from brainseg.growth import Estimate, Visit, growth_rows
from brainseg.io.dicom import Series
from brainseg.io.files import read_table
from brainseg.io.grid import Grid
from brainseg.io.layouts import Source, find_case, list_cases
from brainseg.io.scans import Scan
from brainseg.io.slices import Case
from brainseg.notebook import NotebookSegmenter
from brainseg.patients import date_of, parse_date, read_dates, timepoint
from brainseg.phantom import Head, scan_head, write_patients
from brainseg.reports.growth import (
    ORANGE,
    growth_figure,
    growth_picture,
    growth_table,
    rate_text,
)
from brainseg.reports.volumes import volume_row
from brainseg.run_files import write_growth
from brainseg.visits import Patient, follow, follow_all, in_order_of_time

COARSE = 64, 48  # rows and slices of the heads before they are scanned, to save time
ERRORS = {"interval": [-2.3, 2.6]}
EXPECTED = 0.9, 0.85, 0.95


def case(name: str, patient_id: str = "") -> Case:
    made = Case(name, (1,), (Path(name) / f"{name}_1.tif",), ())
    object.__setattr__(made, "patient_id", patient_id)
    return made


def day(text: str) -> datetime.date:
    return datetime.date.fromisoformat(text)


# Dates


@pytest.mark.parametrize(
    ("name", "expected"),
    (
        ("TCGA_CS_4942_19970222", "1997-02-22"),
        ("p1_2014-03-02", "2014-03-02"),
        ("p1-2014-03-02_a", "2014-03-02"),
        ("p1_2014_03_02", "2014-03-02"),
        ("p1_2014.03.02_flair", "2014-03-02"),
        ("1.2.2014.13.32", "None"),
        ("p_20140302T1200", "2014-03-02"),
        ("sub-12345678_ses-20140302", "2014-03-02"),
        ("patient_20991399", "None"),  # a number
        ("phantom_003", "None"),
    ),
)
def test_dates_in_names(name, expected):
    found, notes = date_of(case(name), {})
    assert str(found) == expected and not notes


@pytest.mark.parametrize(
    ("written", "said"),
    (
        ("2014-02-30", "is not in the calendar"),
        ("2014-13-01", "is not in the calendar"),
        ("March", "is not written as 2014-03-02"),
        ("02.03.2014", "is not written as 2014-03-02"),
        ("03/02/2014", "is not written as 2014-03-02"),
        ("41700", "is not written as 2014-03-02"),
        ("2199-01-01", "is in the future"),
        ("1979-12-31", "is before 1980"),
        ("1867-06-15", "is before 1980"),
    ),
)
def test_dates_that_no_scan_can_have(written, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        parse_date(written)
    found, notes = date_of(case(f"p_{written}"), {})
    assert found is None
    if written[:2] in ("19", "20"):  # other numbers in a name are not taken for dates
        assert len(notes) == 1 and said in notes[0] and "--dates" in notes[0]
    table = tmp_path / "dates.csv"
    table.write_text(f"case,date\na,{written}\n")
    with pytest.raises(ValueError, match=f"dates.csv: a: .*{said}"):
        read_dates(table, ["a"])


def test_table_of_dates(tmp_path):
    table = tmp_path / "dates.csv"
    table.write_text("date,case,note\n2014-03-02,a,x\n20150401,b,\n2014-03-02,a,again\n")
    dates = {"a": day("2014-03-02"), "b": day("2015-04-01")}
    assert read_dates(table, ["a", "c"]) == dates
    table.write_text("case;date\na;2014-03-02\nb;20150401\n")  # by Excel
    assert read_dates(table, "a") == dates
    with pytest.raises(ValueError, match="none of its names, such as a, is a case of this run"):
        read_dates(table, ["a.nii.gz"])
    table.write_text("case,date\na,2014-03-02\na,2014-03-03\n")
    with pytest.raises(ValueError, match="gives a two dates, 2014-03-02 and 2014-03-03"):
        read_dates(table, "a")
    table.write_text("case,when\na,2014-03-02\n")
    with pytest.raises(ValueError, match="columns case and date"):
        read_dates(table, "a")


def test_dates_of_cases_that_no_patient_shares_are_said(tmp_path):
    measured = [{"case": name, "patient": name, "slices": 4} for name in "ab"]
    sources = [Source(name, tmp_path / name, find_case) for name in "ab"]
    patients, notes = follow_all(sources, measured, tmp_path, {"a": day("2014-03-02")}, None)
    assert not patients and notes[0].startswith("--dates: each case is of another patient")


def test_table_goes_before_the_name_and_says_so():
    found, notes = date_of(case("p_20140302"), {"p_20140302": day("2014-03-05")})
    assert found == day("2014-03-05")
    assert notes == [
        "p_20140302: 2014-03-05 by --dates, but 2014-03-02 by its name; 2014-03-05 is used"
    ]


def test_dates_of_dicom_headers():
    header = pydicom.Dataset()
    header.StudyDate = "20140302"
    grid = Grid((4, 4, 4), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0), np.eye(3))
    series = Series(Path("p/series"), (Path("p/series/1.dcm"),), header)
    scan = Scan("p_20140302", (1, 2, 3, 4), (series,), (), grid, 1)
    assert date_of(scan, {}) == (day("2014-03-02"), [])
    found, notes = date_of(replace(scan, name="p_20140401"), {})
    assert found == day("2014-03-02")
    assert "2014-03-02 by its DICOM header, but 2014-04-01 by its name" in notes[0]
    found, notes = date_of(scan, {"p_20140302": day("2014-05-01")})
    assert found == day("2014-05-01") and len(notes) == 2
    header.StudyDate = "20990101"
    found, notes = date_of(replace(scan, name="p"), {})
    assert found is None and "is in the future (its DICOM header)" in notes[0]


def bids_session(root: Path, session: str) -> Path:
    folder = root / "sub-01" / session
    (folder / "anat").mkdir(parents=True)
    image = nibabel.Nifti1Image(np.ones((8, 8, 4), np.uint8), np.diag([1.0, 1, 1, 1]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, folder / "anat" / f"sub-01_{session}_FLAIR.nii.gz")
    return folder


def test_dates_of_bids(tmp_path):
    one, two, three = (bids_session(tmp_path, name) for name in ("ses-a", "ses-b", "ses-c"))
    (one / "sub-01_ses-a_scans.tsv").write_text(
        "filename\tacq_time\nanat/sub-01_ses-a_T1w.nii.gz\t1867-01-01T00:00:00\n"
        "anat/sub-01_ses-a_FLAIR.nii.gz\t1867-06-15T13:45:30\n"
    )
    (two.parent / "sub-01_sessions.tsv").write_text(
        "session_id\tacq_time\nses-a\tn/a\nses-b\t2014-03-02T10:00:00\nses-c\t1950-01-01\n"
    )
    cases = [source.open() for source in list_cases(tmp_path)]
    assert date_of(cases[0], {}) == (day("1867-06-15"), [])  # shifted for privacy
    assert date_of(cases[1], {}) == (day("2014-03-02"), [])
    found, notes = date_of(cases[2], {})
    assert found is None and "1950-01-01 is before 1980 (sub-01_sessions.tsv)" in notes[0]
    assert three.is_dir()
    (two.parent / "sub-01_sessions.tsv").write_bytes(b"\xff\xfe\0")
    found, notes = date_of(cases[2], {})
    assert found is None and notes == [
        "sub-01_ses-c: its scans.tsv or sessions.tsv is not a table; mend it"
    ]


@pytest.mark.parametrize(
    ("name", "patient", "number"),
    (
        ("BraTS-GLI-00020-001", "BraTS-GLI-00020", 1),
        ("sub-01_ses-12", "sub-01", 12),
        ("p_week-044", "p", 44),
        ("sub-01_ses-late", "sub-01", None),
    ),
)
def test_timepoints(name, patient, number):
    assert timepoint(name, patient) == number


# Order


def test_dated_scans_are_in_order():
    scans = [case("p_20150401"), case("p_20140302"), case("p_late")]
    ordered, notes = in_order_of_time({"p": scans, "q": [case("q_20140302")]}, {})
    assert [(scan.name, str(date)) for scan, date in ordered["p"]] == [
        ("p_20140302", "2014-03-02"),
        ("p_20150401", "2015-04-01"),
    ]
    assert list(ordered) == ["p"]
    assert notes == ["p_late: has no date, and no part in the growth of p"]


def test_timepoint_numbers_give_an_order():
    scans = [case("BraTS-GLI-1-010"), case("BraTS-GLI-1-002")]
    ordered, notes = in_order_of_time({"BraTS-GLI-1": scans}, {})
    assert [(scan.name, date) for scan, date in ordered["BraTS-GLI-1"]] == [
        ("BraTS-GLI-1-002", None),
        ("BraTS-GLI-1-010", None),
    ]
    assert "no rate" in notes[0]


def test_a_date_in_the_name_of_a_patient_is_not_that_of_a_scan():
    """Some number patients by a date, such as that of their birth."""
    names = "sub-19850412_ses-20140302", "sub-19850412_ses-1", "sub-19850412_ses-2"
    ordered, notes = in_order_of_time({"sub-19850412": [case(name) for name in names[1:]]}, {})
    assert [date for _, date in ordered["sub-19850412"]] == [None, None]
    assert notes == ["sub-19850412: timepoints without dates: their order, but no rate"]
    found, notes = date_of(case(names[0]), {}, "sub-19850412")
    assert found == day("2014-03-02") and not notes


def test_scans_that_nothing_orders_are_left_out_in_one_sentence():
    cases = {name: [case(f"{name}_a"), case(f"{name}_b")] for name in "pq"}
    ordered, notes = in_order_of_time(cases, {})
    assert not ordered and len(notes) == 1 and notes[0].startswith("2 patients")


def test_two_scans_on_one_day_are_said():
    scans = [case("p_20140302_a"), case("p_20140302_b")]
    ordered, notes = in_order_of_time({"p": scans}, {})
    assert len(ordered["p"]) == 2 and "are both of 2014-03-02" in notes[0]


def test_two_patients_under_one_name_are_left_out():
    scans = [case("TCGA_1_20140302", "A"), case("TCGA_1_20150302", "B")]
    ordered, notes = in_order_of_time({"TCGA_1": scans}, {})
    assert not ordered and "of the patients A and B" in notes[0]


# Registration and pictures


@pytest.fixture(scope="module")
def patient(tmp_path_factory) -> list[tuple[Measured, datetime.date]]:
    """Return three scans of a phantom patient with their true masks, the last of another one."""
    folder = tmp_path_factory.mktemp("patients")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "DETAIL", COARSE)
        write_patients(folder, patients=1, scans=3, growth=8, size=64)
    scans = []
    for path in sorted(folder.glob("*_mask.nii.gz")):
        scan = find_case(path.with_name(path.name.replace("_mask", "")))
        volume, mask = scan.read_pair()
        row = volume_row(scan, volume, mask, EXPECTED)
        scans.append((Measured(scan, mask, row), day(scan.name.rpartition("_")[2])))
    return scans


def test_phantom_patient_grows_as_it_should(patient):
    followed, notes = follow(patient, ERRORS)
    assert not notes and [view.label for view in followed.views] == [str(d) for _, d in patient]
    rows = followed.rows
    assert rows[-1]["mm_per_year"] == pytest.approx(8, abs=1.5)
    assert rows[-1]["mm_per_year_low"] < 8 < rows[-1]["mm_per_year_high"]
    last = followed.views[-1]
    inside = (last.mask & last.first).sum() / last.first.sum()
    assert inside > 0.9  # registered: the first lesion lies in the last one
    assert last.mask.sum() > last.first.sum()
    assert "mm a year (80 % interval" in rate_text(followed)
    assert growth_picture(followed)[:4] == b"\x89PNG"


def test_without_registration_volumes_stay(patient):
    followed, notes = follow(patient, ERRORS, with_registration=False)
    assert not notes and not followed.views
    assert followed.rows[-1]["mm_per_year"] is not None
    assert growth_picture(followed)[:4] == b"\x89PNG"


def test_scan_that_cannot_be_registered_is_said(patient, tmp_path):
    (first, start), (second, date), _ = patient
    image = nibabel.load(second.case.folder)
    noise = np.random.default_rng(0).integers(0, 255, image.shape, np.uint8)
    path = tmp_path / second.case.folder.name
    nibabel.save(nibabel.Nifti1Image(noise, None, image.header), path)
    other = replace(second, case=find_case(path))
    followed, notes = follow([(first, start), (other, date)], ERRORS)
    assert len(notes) == 1 and "cannot be registered" in notes[0] and len(followed.views) == 1
    row = followed.rows[1]
    assert row["comparable"] == "no" and "no common frame" in row["why_not"]
    assert row["lesion_ml"] == pytest.approx(second.row["lesion_ml"], rel=1e-5)


def test_component_without_a_partner_is_said(patient):
    (first, start), (second, date), _ = patient
    mask = second.mask.copy()
    mask[len(mask) // 2, 30:36, 30:36] = False
    middle = len(mask) // 4
    assert not mask[middle - 2 : middle + 2, 28:36, 28:36].any()
    mask[middle - 1 : middle + 1, 29:35, 29:35] = True
    followed, _ = follow([(first, start), (replace(second, mask=mask), date)], ERRORS)
    assert "ml without a partner" in followed.rows[1]["why_not"]


def test_slices_without_positions_have_no_views(phantoms):
    scans = [find_case(phantoms / f"phantom_00{k}") for k in (0, 1)]
    measured = []
    for scan, date in zip(scans, ("2014-01-01", "2015-01-01"), strict=True):
        volume, mask = scan.read_pair()
        measured.append((Measured(scan, mask, volume_row(scan, volume, mask)), day(date)))
    followed, notes = follow(measured, ERRORS)
    rows = growth_rows(followed.visits)
    assert not followed.views and not notes
    assert rows[1]["comparable"] == "no" and "no pixel size" in rows[1]["why_not"]
    assert rows[1]["lesion_ml"] is None and rows[1]["mm_per_year"] is None


# Phantom patients


def test_lesion_of_a_phantom_has_its_volume():
    head = Head.make(np.random.SeedSequence(5))
    share = head.with_lesion(20.0)[..., 3]
    voxel = 220 / 112 * 220 / 112 * 150 / 79
    assert (share > 0.5).sum() * voxel / 1000 == pytest.approx(20, rel=0.02)
    voxels, mask, grid = scan_head(np.random.default_rng(0), head.with_lesion(20.0), 64)
    assert voxels.shape[:3] == mask.shape == grid.shape
    assert mask.sum() * np.prod(grid.spacing) / 1000 == pytest.approx(20, rel=0.06)


# The whole program


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Return a folder with images of two phantom patients, and weights with a fit in their card."""
    root = tmp_path_factory.mktemp("growth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phantom, "DETAIL", COARSE)
        write_patients(root / "images", patients=2, scans=2, growth=4, size=48)
    weights = make_weights(root / "unet.pt")
    shipped = next((ROOT / "weights" / "unet-folds").glob("*.json"))
    fit = json.loads(shipped.read_text())["expected_dsc"] | {"min_volume": 0, "tta": False}
    card = json.loads(weights.with_suffix(".json").read_text()) | {"expected_dsc": fit}
    weights.with_suffix(".json").write_text(json.dumps(card))
    return root


def run(cohort: Path, out: Path, *flags: object) -> dict[str, dict[str, str]]:
    """Run inference.py; return growth.csv by case."""
    argv = ["--images", cohort / "images", "--weights", cohort / "unet.pt", "--predictions", out]
    argv += ["--figure", out.with_suffix(".png"), "--device", "cpu", "--workers", 1, *flags]
    inference.main([*map(str, argv)])
    return {row["case"]: row for row in read_rows(out / "growth.csv")}


def check_notebook_agrees(cohort: Path, rows: list[dict[str, str]]) -> None:
    """The hub's segmenter gives the numbers of growth.csv, whatever the order of the scans."""
    segmenter = NotebookSegmenter.from_weights(cohort / "unet.pt", device="cpu")
    scans = []
    for row in rows:
        scan = find_case(cohort / "images" / f"{row['case']}.nii.gz")
        scans.append((row["date"], scan.read(), scan.spacing))
    measured = segmenter.growth(scans[::-1], patient=rows[0]["patient"])
    assert [row.pop("case") for row in measured] == ["scan 2", "scan 1"]
    for row, written in zip(measured, rows, strict=True):
        for name, value in row.items():
            if isinstance(value, float):
                assert value == pytest.approx(float(written[name]), rel=1e-4), name
            elif name != "why_not":  # which names the cases
                assert str("" if value is None else value) == written[name], name


def visit_of(name: str, patient: str, ml: float = 8, spacing=(5.0, 1.0, 1.0), date=None) -> Visit:
    volume = Estimate(ml, ml / 1.2, ml * 1.2)
    return Visit(name, patient, date, volume, None, spacing, "FLAIR", "", "")


def test_growth_csv_is_in_order_of_time_and_forgets_other_patients(tmp_path, capsys):
    path = tmp_path / "growth.csv"
    names = ["p_tp1", "p_tp2", "p_tp10"]
    p = Patient(tuple(visit_of(name, "p") for name in names), (), 1.0)
    q = Patient((visit_of("q_1", "q"), visit_of("q_2", "q")), (), 1.0)
    write_growth([q, p], ["said"], path, "run", {})
    assert list(read_table(path)) == [*names, "q_1", "q_2"]
    assert capsys.readouterr().err == "said\n"

    write_growth([], [], path, "run", {"p_tp1": "p"})  # one of its scans, segmented again
    assert list(read_table(path)) == [*names, "q_1", "q_2"]
    # The scans of p turn out to be of others; q is not in this run.
    write_growth([], [], path, "run", dict.fromkeys(names, "another"))
    assert list(read_table(path)) == ["q_1", "q_2"]
    write_growth([], [], path, "other weights", {"q_1": "q", "q_2": "q"})
    assert not path.exists()


def test_growth_without_a_pixel_size(tmp_path):
    visits = []
    for date in ("2014-03-02", "2015-03-02"):
        visits.append(visit_of(date, "p", np.nan, None, day(date)))
    patient = Patient(tuple(visits), (), 1.0)
    assert rate_text(patient).endswith("the pixel size is not known; give it with --spacing")
    assert growth_picture(patient)[:4] == b"\x89PNG"
    table = growth_table([patient], tmp_path / "growth.csv")
    assert table.note.startswith("Scans that are hard to compare: of p (why_not in")


def test_a_rate_from_scans_that_are_hard_to_compare_says_so():
    doubtful = ", from scans that are hard to compare"
    first = visit_of("p_1", "p", 9, date=day("2014-03-02"))
    last = visit_of("p_2", "p", 12, date=day("2015-03-02"))
    assert doubtful not in rate_text(Patient((first, last), (), 1.0))
    last = replace(last, concern="the mask is probably poor")
    assert rate_text(Patient((first, last), (), 1.0)).endswith(doubtful)


def test_the_line_of_growth_is_the_weighted_fit():
    visits = []
    for years, (ml, error) in enumerate([(4, 1.5), (7, 1.02), (8, 1.5), (16, 1.3)]):
        visit = visit_of(str(years), "p", ml, date=datetime.date(2014 + years, 3, 2))
        visits.append(replace(visit, volume=Estimate(ml, ml / error, ml * error)))
    axes = growth_figure(Patient(tuple(visits), (), 1.0)).subfigs[0].axes[0]
    (line,) = [line for line in axes.lines if line.get_color() == ORANGE]
    places = line.get_xdata()
    diameters = [visit.diameter for visit in visits]
    weights = [1 / (diameter.high - diameter.low) for diameter in diameters]
    fit = np.polyfit(places, [diameter.value for diameter in diameters], 1, w=weights)
    assert line.get_ydata() == pytest.approx(np.polyval(fit, places))


def test_growth_looks_at_the_flair_that_was_chosen(tmp_path):
    """Of four channels, FLAIR may be the first."""
    volume = np.arange(4 * 6 * 20 * 24, dtype=np.int16).reshape(4, 6, 20, 24)
    images = [sitk.GetImageFromArray(channel) for channel in volume]
    sitk.WriteImage(sitk.JoinSeries(images), str(tmp_path / "head.nii.gz"))
    (source,) = list_cases(tmp_path / "head.nii.gz", channels=(1, 0, 2))
    flair = read_flair(Measured(source.open(), volume[0] > 0, {}))
    assert flair is not None and (sitk.GetArrayFromImage(flair) == volume[0]).all()


def test_growth_of_a_cohort(cohort, tmp_path, capsys):
    page = tmp_path / "page.html"
    rows = run(cohort, tmp_path / "out", "--report", page)
    names = sorted(path.name[:-7] for path in (cohort / "images").glob("*[0-9].nii.gz"))
    assert sorted(rows) == names
    later = rows[names[1]]
    assert later["patient"] == "phantom_000" and int(later["days"]) >= 120
    low, value, high = (float(later[f"mm_per_year{end}"]) for end in ("_low", "", "_high"))
    assert low < value < high
    volumes = {row["case"]: row for row in read_rows(tmp_path / "out" / "volumes.csv")}
    assert later["lesion_ml"] == volumes[names[1]]["lesion_ml"]
    said = capsys.readouterr().out
    assert "Growth: 2 patients" in said and "mm a year" in said
    text = page.read_text()
    assert text.count('<img class="growth"') == 2 and "phantom_001:" in text
    for verdict in ("progress", "respon", "stable"):
        assert verdict not in text.partition("</style>")[2].lower()

    # Of masks that are kept.
    assert run(cohort, tmp_path / "out", "--skip-existing", "--cases", *names[:2]) == rows

    # Dates by a table, and the rows of other patients stay.
    dates = tmp_path / "dates.csv"
    dates.write_text(f"case,date\n{names[1]},2020-01-01\n")
    again = run(cohort, tmp_path / "out", "--cases", *names[:2], "--dates", dates, "--no-register")
    assert again[names[1]]["date"] == "2020-01-01" and again[names[2]] == rows[names[2]]
    assert f"{names[1]}: 2020-01-01 by --dates, but" in capsys.readouterr().err
    check_notebook_agrees(cohort, [again[name] for name in names[:2]])

    # The settings of a run repeat it.
    inference.main(["--config", str(tmp_path / "out" / "args.json")])


def test_table_of_dates_is_read_before_the_long_work(cohort, tmp_path):
    dates = tmp_path / "dates.csv"
    dates.write_text("case,date\na,2014-02-30\n")
    with pytest.raises(SystemExit, match="dates.csv: a: the date '2014-02-30' is not in"):
        run(cohort, tmp_path / "out", "--dates", dates)
    assert not (tmp_path / "out" / "volumes.csv").exists()


def test_phantom_patients_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr(phantom, "DETAIL", COARSE)
    phantom.main([str(tmp_path / "p"), "--patients", "1", "--scans", "2", "--size", "32"])
    assert len(list((tmp_path / "p").glob("*_mask.nii.gz"))) == 2
    first, second = read_rows(tmp_path / "p" / "truth.csv")
    days = day(second["case"][-10:]) - day(first["case"][-10:])
    grown = float(second["diameter_mm"]) - float(first["diameter_mm"])
    assert grown == pytest.approx(4 * days.days / 365.25, abs=1e-3)
    with pytest.raises(SystemExit):
        phantom.main([str(tmp_path / "q"), "--patients", "1", "--scans", "1"])
