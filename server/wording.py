"""Put sentences of the readers, which name options of the commands, into words of the page."""

import re

OPTION = r"(?<![\w-])--[a-z]"
CHOOSE = 'choose each file under "One file per sequence" (API: flair, pre and post)'
MOVED = '"The head moved between the sequences" (API: register)'
SCANS = (
    "holds no scan; choose a volume file (.nii.gz, .nii, .nrrd, .mha), slices named "
    "<anything>_<number>.tif or .png, the files of a DICOM study, or a zip archive of one of these"
)
PHRASES = (
    (rf" \([^()]*{OPTION}[^()]*\)", ""),
    (r"holds no slice named [^;]* and no DICOM image", SCANS),
    ("give each case a folder", "send one case at a time"),
    ("use --register", f"tick {MOVED}"),
    ("leave out --register", f"do not tick {MOVED}"),
    ("give it alone, with --images", 'choose it alone, under "Files" (API: images)'),
    ("name the right one with --flair SERIES, alone or with --pre and --post",
     "send the files of the right one alone"),
    ("give it as --flair", 'save it as NIfTI and choose it as FLAIR under "One file per sequence" '
     "(API: flair)"),
    ("name them with --flair, --pre and --post", f"save them as NIfTI and {CHOOSE}"),
    (", or choose with --sequences", ""),
    ("(;|, or) leave out --dicom-seg", ""),
    ("(give them|correct it) with --dates", "name each file, or the folder of each DICOM study, "
     "after its date (p1_2014-03-02)"),
    ("evaluate.py --fit-expected-dsc makes one", "evaluate.py makes one"),
    ("tell them apart with --patients", "send one patient at a time"),
)  # fmt: skip
# What is left of a sentence with an option, from one colon or semicolon to the next.
CLAUSE = re.compile(rf"(?:^|(?<=[;:] ))(?:[^;:]|[;:](?! ))*{OPTION}(?:[^;:]|[;:](?! ))*")


def in_page_words(message: str) -> str:
    """Replace what a message says of options by what to do on the page, or with the API."""
    for phrase, instead in PHRASES:
        message = re.sub(phrase, instead, message)
    return CLAUSE.sub(_remedy, message)


def _remedy(clause: re.Match) -> str:
    if re.search("--(sequences|flair|pre|post|channels|images)", clause[0]):
        return CHOOSE
    return "see what the page takes (API: GET /api)"
