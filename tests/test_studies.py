"""Test DICOM studies: their names and patients in any tree, and which sequence a series is."""

import math
from pathlib import Path

import pydicom
import pytest
from pydicom import uid

from brainseg.io.layouts import list_cases
from brainseg.io.sequences import sequence_of
from brainseg.io.studies import find_studies
from brainseg.patients import patient_of
from brainseg.splits import list_cohort, select_cases, subset_of_patient

# Names and patients


def image(path: Path, patient: str = "", study: str = "1", date: str = "", **tags: object) -> Path:
    """Write the header of an image of a FLAIR series; a study is known by its date too."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = uid.MRImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = uid.generate_uid()
    data.PatientID, data.StudyDate = patient, date
    data.StudyInstanceUID = f"1.{study}{date}"
    data.SeriesInstanceUID = f"{data.StudyInstanceUID}.{tags.pop('series', 1)}"
    data.Modality, data.Rows, data.SeriesDescription = "MR", 8, "FLAIR"
    for tag, value in tags.items():
        setattr(data, tag, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)
    return path


TREES = {
    "patient folders of one study": (
        {"a/s1/1": ("p1", "1"), "a/s2/1": ("p1", "1"), "b/s1/1": ("p2", "2")},
        {"a": "p1", "b": "p2"},
    ),
    "patient, study, series": (
        {
            "P-1/x/s1/1": ("P-1", "1", "20200101"),
            "P-1/y/s1/1": ("P-1", "1", "20210101"),
            "P-2/z/s1/1": ("P-2", "1", "20220101"),
        },
        {"P-1_20200101": "P-1", "P-1_20210101": "P-1", "P-2": "P-2"},
    ),
    "collection of one patient": ({"LGG/P-1/x/s1/1": ("P-1", "1")}, {"P-1": "P-1"}),
    "collection of two patients": (
        {"LGG/P-1/x/s1/1": ("P-1", "1"), "LGG/P-2/x/s1/1": ("P-2", "2")},
        {"P-1": "P-1", "P-2": "P-2"},
    ),
    "dates of one patient": (
        {"2020/s/1": ("p1", "1", "20200101"), "2021/s/1": ("p1", "1", "20210101")},
        {"2020": "p1", "2021": "p1"},
    ),
    "two patients in one folder": (
        {"1": ("p1", "1", "20200101"), "2": ("p 2/3", "2", "20200101")},
        {"p1_20200101": "p1", "p-2-3_20200101": "p-2-3"},
    ),
    "two studies in one folder": (
        {"1": ("p1", "1", "20200101"), "2": ("p1", "1", "20210101")},
        {"p1_20200101": "p1", "p1_20210101": "p1"},
    ),
    "two studies in one folder, of nobody": (
        {"x/1": ("", "1", "20200101"), "x/2": ("ANONYMOUS", "1", "20210101")},
        {"x_20200101": "x", "x_20210101": "x"},
    ),
    "patients who share a name that says nothing": (
        {"a/1": ("ANON", "1"), "b/1": ("ANON", "2"), "c/1": ("0000", "3"), "d/1": ("0000", "4")},
        {name: name for name in "abcd"},
    ),
    "one pseudonym": (
        {"a/1": ("ANON-07", "1"), "b/1": ("ANON-07", "2")},
        dict.fromkeys("ab", "ANON-07"),
    ),
    "patients who share a StudyInstanceUID": (
        {"1": ("p1", "1", "20200101"), "2": ("p2", "1", "20200101")},
        {"p1_20200101": "p1", "p2_20200101": "p2"},
    ),
    "the LGG patients": (
        {"x/1": ("TCGA-CS-4941", "1"), "TCGA_CS_4942/1": ("77", "2")},
        {"x": "TCGA_CS_4941", "TCGA_CS_4942": "TCGA_CS_4942"},
    ),
}


@pytest.mark.parametrize("tree", TREES)
def test_a_case_for_each_patient_and_study(tmp_path, tree):
    files, expected = TREES[tree]
    for place, header in files.items():
        image(tmp_path / "in" / place, *header)
    sources = list_cohort(tmp_path / "in")
    assert {source.name: patient_of(source) for source in sources} == expected
    assert len(sources) == len(expected)


def test_studies_of_one_date_have_names_of_their_own(tmp_path):
    for number in "12":
        image(tmp_path / number, "p1", date="20200101", StudyInstanceUID=f"1.{number}")
    sources = list_cohort(tmp_path)
    names = [source.name for source in sources]
    assert len(set(names)) == 2
    assert all(name.startswith("p1_20200101_ses-") for name in names)
    assert {patient_of(source) for source in sources} == {"p1"}


def test_t1_of_one_date_does_not_go_with_flair_of_another(tmp_path):
    image(tmp_path / "1", "p1", date="20200101")
    image(tmp_path / "2", "p1", date="20210101", SeriesDescription="T1", EchoTime=10)
    old, new = find_studies(tmp_path)
    assert [series.words for series in old.series] == ["FLAIR"]
    assert [series.words for series in new.series] == ["T1"]


def test_studies_of_a_patient_are_in_one_subset(tmp_path):
    """By the names of their folders they would be 40 patients."""
    for patient in range(20):
        for k, name in enumerate(("first", "again")):
            image(tmp_path / f"{name}{patient}" / "1", f"p{patient}", f"{patient + 1}{k}")
    sources = list_cases(tmp_path)
    train = {source.name for source in select_cases(sources, "train")}
    assert {subset_of_patient(f"first{k}") for k in range(20)} > {"train"}
    for patient in range(20):
        assert (f"first{patient}" in train) == (f"again{patient}" in train)


def test_a_table_of_patients_goes_before_headers(tmp_path):
    image(tmp_path / "in" / "a" / "1", "p1")
    table = tmp_path / "patients.csv"
    table.write_text("case,patient\na,bert\n")
    (listed,) = list_cohort(tmp_path / "in", patients=table)
    assert patient_of(listed) == "bert"
    (listed,) = list_cohort(tmp_path / "in")
    assert patient_of(listed) == "p1"


def test_an_image_cut_anywhere_is_damaged(tmp_path):
    """Without its last field, Rows, it may look like another object, or have no study."""
    whole = image(tmp_path / "anna" / "1", "p1").read_bytes()
    path = tmp_path / "anna" / "2"
    for length in (0, 100, *range(132, len(whole) - 2, 7)):
        path.write_bytes(whole[:length])
        (study,) = find_studies(tmp_path)
        assert study.name == "anna" and study.damaged == (path,), length


@pytest.mark.parametrize("right, wrong", [(b"\x16\0UI", b"\x16\0UA"), (b"1.2.840", b"1.2\\840")])
def test_an_odd_class_does_not_stop_the_list(tmp_path, right, wrong):
    path = image(tmp_path / "anna" / "1", "p1")
    image(tmp_path / "bert" / "1", "p2", "2")
    path.write_bytes(path.read_bytes().replace(right, wrong))
    assert [source.name for source in list_cases(tmp_path)] == ["anna", "bert"]


def test_a_report_cut_anywhere_is_passed_over(tmp_path):
    image(tmp_path / "anna" / "1", "p1")
    path = image(tmp_path / "anna" / "2.dcm", "p1", SOPClassUID=uid.BasicTextSRStorage, Rows=None)
    whole = path.read_bytes()
    for length in range(400, len(whole), 7):
        path.write_bytes(whole[:length])
        (study,) = find_studies(tmp_path)
        assert not study.damaged, length


def test_a_ct_study_beside_an_mr_study_is_passed_over(tmp_path):
    for number in "12":
        image(tmp_path / "anna" / f"mr{number}" / "1", "p1", series=number)
    image(tmp_path / "anna" / "ct" / "1", "p1", study="2", Modality="CT")
    for root in (tmp_path, tmp_path / "anna"):
        (study,) = find_studies(root)
        assert study.name == "anna" and len(study.series) == 2


def test_listing_reads_each_header_once(tmp_path, monkeypatch):
    for k in range(30):
        image(tmp_path / f"{k % 3}" / f"{k % 6}" / f"{k}", f"p{k % 3}", f"{k % 3}", series=k % 6)
    read, options = [], []
    dcmread = pydicom.dcmread

    def counted(path: Path, **how: object) -> pydicom.Dataset:
        read.append(path)
        options.append(how)
        return dcmread(path, **how)

    monkeypatch.setattr(pydicom, "dcmread", counted)
    assert len(list_cases(tmp_path)) == 3
    assert len(read) == len(set(read)) == 30
    assert all(how["stop_before_pixels"] for how in options)


# Words

# Descriptions without times and agent, by what the series is; one a line or separated by |.
DESCRIPTIONS = {
    "pre-contrast": """
        T1 ax ohne KM | T1 WO GAD | T1 w/o C | T1 W/O | T1 non-contrast | T1 noncontrast
        T1 NON CON | T1 no gad | T1 unenhanced | T1 non enhanced | T1 C- | AX T1 -C
        t1_tse_tra_nativ | T1 NATIV | T1 vor KM | T1 o. KM | T1 oKM | T1 tra ohne Kontrastmittel
        T1 kein KM | T1 sans injection | T1 SANS GADO | T1 avant injection | T1 non injecté
        T1 SIN CONTRASTE | T1 sin gadolinio | T1 S/C | T1 s/ contraste | T1 antes de contraste
        T1 senza mdc | T1 SENZA MDC | T1 prima di mdc | T1 senza m.d.c.
        T1 senza mezzo di contrasto | T1 pre-mdc | T1 sem contraste | T1 SEM GADOLINIO
        T1 pré contraste | T1 PRÉ | T1 zonder contrast | T1 blanco | T1 voor contrast
        T1 bez kontrastu | T1 bez k | T1 przed kontrastem | T1 natywne | T1 utan kontrast
        T1 uden kontrast | T1 før kontrast | T1 bez k.l. | T1 fara contrast | T1 без контраста
        T1 до контраста | T1 kontrasztanyag nélkül | T1_SE_AX | t1_mpr_sag_p2_iso
        T1 posterior fossa | T1 postop | T1 post op | T1 pre-op | T1 post RT ohne KM
        T1 nach OP | sT1W_3D_TFE | AXT1 | Sag 3D T1 MPRAGE | T1 pre SE | T1 NC | T1 plain
        T1 w.o. contrast | 3D BRAVO | T1 sans IV | T1 senza contrasto | T1 pre-gd | T1PRE
        eT1W_SE | csT1W_3D_TFE | T1_preKM | T1 pas de gado | T1 sans injection de gado
        T1 senza iniezione di mdc | T1 without IV contrast injection
        T1 IV- | T1 Gd- | T1 GADO- FS | T1 K- | T1 s/gd | T1 Prä KM | T1 vor i.v. KM
        T1w wo gad | T1 without FS
        T1PRECONTRAST | T1 tra bez kontr. | T1 senza m.c. | T1 ohne CM | T1 ohne i.v. Kontrast
    """,
    "post-contrast": """
        T1 mit KM | T1 m. KM | T1 mKM | T1 +KM | T1+Gd | T1 +C | T1 C+ | T1 KM | T1 nach KM
        T1 n. KM | T1 post KM | T1 postKM | t1_postgd | T1 POST | T1 GAD | T1 gado | T1 Gd
        T1ce | t1 ce | T1 contrast-enhanced | T1 CE | T1 W/ GAD | T1 with contrast
        T1 W CONTRAST | T1 W C | T1 w/c | T1 après injection | T1 APRES GADO | T1 avec injection
        T1 INJ | T1 gadolinium | T1 +gado | T1 con contraste | T1 con gadolinio | T1 C/C
        T1 c/ contraste | T1 tras contraste | T1 postcontraste | T1 CON CIV | T1 con mdc
        T1 dopo mdc | T1 mdc | T1 post mdc | T1 com contraste | T1 após gadolínio
        T1 apos gadolinio | T1 PÓS | T1 pós contraste | T1 pos-gd | T1 met contrast
        T1 na contrast | T1 na gado | T1 z kontrastem | T1 po kontraście | T1 po k | T1 +K
        T1 med kontrast | T1 efter kontrast | T1 s kontrastem | T1 po k.l. | T1 cu contrast
        T1 с контрастом | T1 после контраста | T1 Dotarem | T1GD | T1 MPRAGE GADOVIST
        T1 postop +KM | T1 post-op with gad | T1 +IV | T1 Postcontrast | T1 enhanced | MPRAGE +c
        T1 plus contrast | T1 après injection de gadolinium
        T1 IV+ | T1 K+ | T1POSTCONTRAST | T1POST | T1mKM | T1nachKM | T1 nach i.v. KM
        T1 ENH | T1 con mc | T1 + CM
        T1W W CONTRAST | T1 post contr. | t1_fl2d_tra_KM | T1W_3D_TFE_GADO | T1 con cte
        T1 c/gd | T1 post op +C
    """,
    "doubtful": """
        T1 pre and post contrast | T1 w/wo contrast | T1 W WO | T1 with and without contrast
        T1 ohne und mit KM | T1 +/- C | T1 ± KM | T1 pre/post | T1 C | T1-C
        T1 avec et sans injection | T1 con y sin contraste | T1 con e senza mdc | T1 KM?
        T1 tra + | T1 com e sem contraste | T1 mit/ohne KM | T1 without & with gad
        T1 PC | T1 T2 | T1 with | T1 -KM | T1 mit
    """,
    "FLAIR": """
        FLAIR | AX T2 FLAIR | t2_tirm_tra_dark-fluid_fs | t2_spc_da-fl_sag_p2_iso
        t2_space_dark-fluid_sag | SAG CUBE T2 FLAIR | 3D VISTA FLAIR | T2W_FLAIR | FLAIR +C
        FLAIR post gad | FLAIR nach KM | AX FLAIR ohne KM | 3D_Brain_VIEW_FLAIR | Flair axial
        t2f | T2 FLAIR post contrast | t2_spc_ir_da-fl | AX FLAIR FS | sub-01_FLAIR
        tse_dark-fluid | ax t2 darkfluid | FLAIR_longTR | FLAIR après injection
        eT2W_FLAIR SENSE
    """,
    "other": """
        t2_tse_tra | PD | AX T2* | T2 STAR | localizer | LOC | Lokalizator | survey | scout
        3 Plane | DWI b1000 | ADC | dADC | SWI | TOF 3D | MRA | T1 SUB | SUB T1 | Subtraktion T1
        soustraction | sottrazione T1 | sustracción | T1 MAP | FLAIR MAP | MIP | t2_spc_dir
        DIR | STIR | T1 C-SPINE | PhoenixZIPReport | screen save | Perfusion | b0 | fMRI
        MR spectroscopy | T1 phase contrast venography | AX PD T2 | repérage | Übersicht
    """,
}
# The agents of a series described as T1 SE, by what the series is.
AGENTS = {
    "pre-contrast": """
        none | NONE | no | N/A | n.a. | none given | None Given | NO CONTRAST | nein | keine
        keines | ohne | kein KM | sans | aucun | ninguno | sin contraste | nessuno | senza
        nenhum | sem | geen | brak | bez | 0 | 0 ml | 0.0 | - | -- | . | not given | w/o | nil
        N | without | NA | nej | не | unenhanced | non injecté | No Contrast Administered
        nicht gegeben | niet toegediend | n.v.t. | não | ikke gitt | saline | NaCl | 0 cc
        pas d'injection
    """,
    "post-contrast": """
        Gadovist | 7,5 ml Gadovist | 0.1 mmol/kg Dotarem | 10CC MAGNEVIST | yes | GADO | KM
        Multihance | IV | 15 ml | Gd-DTPA | with | MAGNEVIST 20 ml i.v. | 0,1mmol/kg | CONTRAST
        ProHance | contraste | + | X
    """,
    "doubtful": """
        ANONYMIZED | removed
        unknown | ? | unbekannt | UNK
    """,
}


def listed(table: dict[str, str]) -> list[tuple[str, str]]:
    rows = []
    for sequence, texts in table.items():
        for line in texts.strip().splitlines():
            rows += [(words.strip(), sequence) for words in line.split(" | ")]
    return rows


@pytest.mark.parametrize("description, sequence", listed(DESCRIPTIONS))
def test_which_sequence_a_description_means(description, sequence):
    assert sequence_of(description, math.nan, math.nan, "") == sequence
    assert sequence_of(description.upper(), math.nan, math.nan, "") == sequence


@pytest.mark.parametrize("agent, sequence", listed(AGENTS))
def test_which_sequence_an_agent_means(agent, sequence):
    assert sequence_of("T1 SE", 12, math.nan, agent) == sequence


@pytest.mark.parametrize(
    "description, echo, inversion, agent, sequence",
    [
        ("AX FLAIR", 120, 2500, "", "FLAIR"),
        ("t2_tirm_tra_dark-fluid", 90, 2500, "Gadovist", "FLAIR"),
        ("AX T1 FLAIR", 9, 780, "", "pre-contrast"),
        ("AX T1 FLAIR +C", 9, 780, "", "post-contrast"),
        ("AX T1 FLAIR", 120, 2500, "", "doubtful"),
        ("FLAIR", 9, 780, "", "doubtful"),
        ("", 120, 2500, "", "FLAIR"),
        ("", 9, math.nan, "", "doubtful"),
        ("", 95, math.nan, "", "other"),
        ("t2_tirm_tra", 90, 2500, "", "FLAIR"),
        ("t2_tirm_tra", 90, 160, "", "other"),
        ("MPRAGE post", 3, 900, "", "post-contrast"),
        ("T1 pre", 12, math.nan, "Gadovist", "doubtful"),
        ("T1 post", 12, math.nan, "none", "post-contrast"),
        ("T1 ohne KM", 12, math.nan, "unbekannt", "pre-contrast"),
        ("T1 MPRAGE", 3, 900, "Gadovist", "post-contrast"),
        ("AX T2", 95, math.nan, "", "other"),
        ("SE", 12, math.nan, "Gadovist", "other"),
    ],
)
def test_words_times_and_agent_together(description, echo, inversion, agent, sequence):
    assert sequence_of(description, echo, inversion, agent) == sequence
