"""Test which sequence a series is: the table of words, in the languages of hospitals."""

import math

import pytest

from brainseg.io.sequences import sequence_of

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
        T1_preKM | T1 pas de gado
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
        T1 plus contrast
    """,
    "doubtful": """
        T1 pre and post contrast | T1 w/wo contrast | T1 W WO | T1 with and without contrast
        T1 ohne und mit KM | T1 +/- C | T1 ± KM | T1 pre/post | T1 C | T1-C
        T1 avec et sans injection | T1 con y sin contraste | T1 con e senza mdc | T1 KM?
        T1 tra + | T1 com e sem contraste | T1 mit/ohne KM | T1 without & with gad
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
    """,
    "post-contrast": """
        Gadovist | 7,5 ml Gadovist | 0.1 mmol/kg Dotarem | 10CC MAGNEVIST | yes | GADO | KM
        Multihance | IV | 15 ml | Gd-DTPA | with | MAGNEVIST 20 ml i.v. | 0,1mmol/kg | CONTRAST
        ProHance | contraste | + | X
    """,
    "doubtful": """
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
