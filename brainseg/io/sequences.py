"""Tell pre-contrast, FLAIR and post-contrast by words, echo times and contrast agents.

Words that contradict each other or the times make a series doubtful: it is never guessed.
"""

import re
import unicodedata
from itertools import zip_longest

import numpy as np

SEQUENCES = ("pre-contrast", "FLAIR", "post-contrast")  # in the order of the channels
LONG_ECHO, NULLS_CSF = 60.0, 1400.0  # minimum echo and inversion time of a FLAIR in ms

# Each pattern is searched in plain text: small letters without accents.
FLAIR = re.compile(r"flair|dark.?fl|(?<![a-z])da.?fl|t2f(?![a-z])|fluid.?att")
PLANE = (
    r"(?<![a-z0-9])(?:s|e|d|cs|ax|sag|cor|tra|fs|[23]d)*"  # may be written together with T1 or T2
)
T1 = re.compile(rf"{PLANE}t1w?(?!\d)|mp.?rage|(?<![a-z])(bravo|f?spgr|vibe)")
T2 = re.compile(rf"{PLANE}(t2|pd)(?!\d)")
OTHER = re.compile(
    r"(?<![a-z])("
    r"loc|lok|scout|survey|pilot|ubersicht|reperage|topogr|(3|three).?plane|phoenix|report|screen"
    r"|dwi|diff|adc|eadc|trace|dti|tensor|b\d{3,4}|swi|e?swan|t2.?(\*|star)|hemo"
    r"|tof|mr.?[av](?![a-z])|angio|phase.?contr|perf|dsc|dce|asl|cb[fv]|mtt|ttp|fmri|bold"
    r"|spectro|svs|csi|mi?n?ip|map|fus|stir|psir|mp2rage|dir(?![a-z])|double.?inv"
    r"|t1.?rho|c.?spine|spine|[hbl]ws|wirbel|rachis|cervic|column|colonna"
    r"|sub(tr\w*|s)?(?!-?\d|[a-z])|su[bs]tra|soustr|sottr|restas?(?![a-z])|odejm"
    r")"
)
# In the name of a file, words that are not of FLAIR.
OTHER_FILE = re.compile(
    r"(?<![a-z0-9])(t1[a-z0-9]*|t2w?|mprage|dwi|adc|swi|asl)(?![a-z0-9])"
    r"|(?<![a-z0-9])(pre|post|gd|seg[a-z]*|label[a-z]*)$"
)

# Files of other images often hold several volumes: directions, echoes, points in time.
OF_SEVERAL = re.compile(r"(?<![a-z0-9])(dwi|dti|adc|swi|asl|bold|fmri|dsc|dce|perf)(?![a-z0-9])")

# Words before the name of a contrast agent that was not given, and of one that was.
CONTRAST = {
    "English": ("without wo no non not pre before", "with w post after plus"),
    "German": ("ohne kein keine nicht vor pra prae", "mit m nach n"),
    "French": ("sans avant non pas", "avec apres"),
    "Spanish": ("sin antes previo", "con tras despues pos"),
    "Italian": ("senza prima", "con dopo"),
    "Portuguese": ("sem nao antes", "com apos pos"),
    "Dutch": ("zonder geen niet voor", "met na"),
    "Polish": ("bez przed", "z po"),
    "Czech": ("ne pred", "s po"),
    "Scandinavian": ("utan uden uten ikke inte ej fore før", "med efter etter"),
    "Romanian": ("fara inainte", "cu dupa"),
    "Russian": ("без до не нет", "с после"),
}
WITHOUT_WORDS: set[str] = set()
WITH_WORDS: set[str] = set()
for without, with_it in CONTRAST.values():
    WITHOUT_WORDS.update(without.split())
    WITH_WORDS.update(with_it.split())
AFTER = set("post apres apos pos dopo nach efter etter".split())  # if no agent is named, too
OPERATION = tuple("op surg chir rt rx tx srs rad chem treat ther resec biop proc bestr".split())
# The beginnings of the names of agents; whole names; those that need a word above beside them.
AGENTS = tuple(
    "contr kontr gad gd magnevist dotarem multihance prohance omniscan clariscan vueway elucirem "
    "inject injekt inyec iniez infus enhanc контраст".split()
)
ABBREVIATIONS = set("km mdc pdc civ cte kl inj ce enh ку".split())
SHORT = set("c k ka cm mc iv ev".split())
NATIVE = tuple("nativ natyw unenhanc blanco blanko plain kontrastsi kontrastlos nc".split())
FILLERS = set(
    "a al and d da de del di do e el en et i il l la o the un und v y mezzo medio agent".split()
)
# The beginnings of a ContrastBolusAgent that is none, and of one that is not known.
NO_AGENT = tuple(
    "n/ none nil null nothing absent false saline nacl kochsalz kein nein nessun nenhum ningun "
    "aucun brak nie nee nvt nej ingen nem nincs ei yok".split()
)
UNKNOWN = ("?", "unk", "unbek", "inconnu", "descon", "sconos", "onbek", "niezn", "anon", "remov")
ANY_AGENT = "|".join((*AGENTS, *ABBREVIATIONS))
SIGNS = (  # what is written with signs or together, in words
    (rf"\+ ?/? ?-|±|\?|(?<=\s)-(?=({ANY_AGENT}))", " with without "),
    (r"\bw ?/ ?o\b|\bw\.o\b", " without "),
    (r"\b[wc] ?/", " with "),
    (r"\bs ?/|\bo\.? ?(?=km\b)", " without "),
    (r"(?<=\s)-c\b|kontraszt\w* nelkul|\bnon? con\b", " without contrast "),
    (rf"(?<![a-z])(c|k|iv|gado|{ANY_AGENT})-(?!\w)", " without contrast "),
    (r"(?<![a-z])(c|k|iv)\+|t1c\b", " with contrast "),
    (r"(?<![a-z])[mn]\.? ?(?=km\b)|\+", " with "),
    (rf"\b[ie]\.? ?v\.? ?(?={ANY_AGENT})", ""),
    (r"\bi\.v\b", " iv "),
    (r"\bm\.(d\.)?c\b", " mdc "),
    (rf"(?<![a-z])(pre|post|pos|non|nach|mit|ohne|vor)(?=({ANY_AGENT}))", r"\1 "),
)


def sequence_of(words: str, echo: float, inversion: float, agent: str) -> str:
    """Return pre-contrast, FLAIR, post-contrast, "other" or "doubtful" for an MR series.

    `words` describe it, empty if unknown; echo and inversion times are in ms, NaN if unknown. A
    FLAIR nulls CSF with an inversion time of about 2 s and a long echo; "T1 FLAIR" is a T1 with an
    inversion time under a second. Without words, only the times count.
    """
    text = plain(words)
    if OTHER.search(text):
        return "other"
    if T1.search(text):
        if echo >= LONG_ECHO or inversion >= NULLS_CSF or T2.search(text):
            return "doubtful"
        return _which_t1(text, agent)
    if FLAIR.search(text):
        if echo < LONG_ECHO or 0 < inversion < NULLS_CSF:
            return "doubtful"
        return "FLAIR"
    if echo >= LONG_ECHO and inversion >= NULLS_CSF:
        return "FLAIR"
    if not text and 0 < echo < LONG_ECHO and not inversion >= NULLS_CSF:
        return "doubtful"  # T1, proton density or susceptibility
    return "other"


def says_other(words: str) -> bool:
    """Tell whether words name a kind of image that is neither FLAIR nor T1."""
    text = plain(words)
    return bool(OTHER.search(text) or (T2.search(text) and not FLAIR.search(text)))


def contradiction(role: str, words: str) -> str:
    """Return the word by which a name or description is not of `role`, one of SEQUENCES; or ""."""
    text = plain(words)
    flair, t1 = FLAIR.search(text), T1.search(text)
    other = None
    if role == "FLAIR":
        if not flair:
            other = OTHER_FILE.search(text)
    elif flair and not t1:
        other = flair
    else:
        wrong = "after" if role == "pre-contrast" else "before"
        if contrast_in(text) == {wrong}:
            return words
        if not t1:
            other = T2.search(text) or OTHER.search(text)
    return other[0] if other else ""


def _which_t1(text: str, agent: str) -> str:
    said = contrast_in(text)
    if has_agent(agent):
        said.add("after")
    if len(said) > 1 or (not said and plain(agent).startswith(UNKNOWN)):
        return "doubtful"
    return "post-contrast" if said == {"after"} else "pre-contrast"


def has_agent(agent: str) -> bool:
    """Tell whether a ContrastBolusAgent names an agent; "none", "N/A" and "unknown" do not."""
    text = plain(agent).strip("-.*()<>[] ")
    words = _split(text)
    if not words or words[0] in WITHOUT_WORDS | {"n", "na"}:
        return False
    if text.startswith(NO_AGENT + UNKNOWN + NATIVE):
        return False
    return not re.fullmatch(r"[0., ]+[a-z]*", text)


def contrast_in(text: str) -> set[str]:
    """Return what a plain text says of an agent: "before", "after", both if it is unclear."""
    words = [word for word in _split(text) if word not in FILLERS]
    said = set()
    last, is_agent, negative = "", False, False
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        before_operation = following.startswith(OPERATION)
        if not is_agent:  # else "without" holds for the next one too: "sans injection de gado"
            negative = last in WITHOUT_WORDS
        is_agent = word.startswith(AGENTS) or word in ABBREVIATIONS
        is_agent = is_agent or (word in SHORT and (negative or last in WITH_WORDS))
        if word.startswith(NATIVE):
            said.add("before")
        elif is_agent:
            said.add("before" if negative else "after")
        elif word in WITHOUT_WORDS and following in WITH_WORDS:
            said |= {"before", "after"}
        elif word in WITH_WORDS and following in WITHOUT_WORDS:
            said |= {"before", "after"}
        elif word in WITHOUT_WORDS and (word == "pre" or not following):
            if not before_operation:
                said.add("before")
        elif word in AFTER:
            if not before_operation:
                said.add("after")
        elif word in ("c", "pc") or (word in WITH_WORDS and len(word) > 1 and not following):
            said |= {"before", "after"}
        last = word
    return said


def _split(text: str) -> list[str]:
    for sign, word in SIGNS:
        text = re.sub(sign, word, text)
    return re.findall(r"[^\W\d_]+", T1.sub(" ", text))


def plain(text: str) -> str:
    """Return a text in small letters without accents and underscores."""
    letters = unicodedata.normalize("NFKD", text.replace("_", " ").casefold())
    return "".join(letter for letter in letters if not unicodedata.combining(letter)).strip()


def with_copies(volume: np.ndarray, channels: int) -> np.ndarray:
    """Let FLAIR stand in for the other sequences of three `channels`, if a volume has it alone.

    The copies are views, which cannot be written to.
    """
    if volume.shape[3] == 1 and channels == 3:
        return np.broadcast_to(volume, (*volume.shape[:3], channels))  # once in memory
    return volume
