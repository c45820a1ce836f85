"""The reports of radiologists: which texts count as a report, and their cleaned form.

Every published number of report generation was computed on texts that R2Gen's rules had cleaned.
`clean_report` follows these rules, also where they are odd. `prepare_reports` decides which
subjects have a report at all.
"""

import re

MOST_WORDS = 5000       # a longer text is cut; reports have a few hundred words at most
# What R2Gen deletes in a sentence. Its rule contains the range from : to [, which also holds these
# four: < = > @. A hyphen is not deleted.
DELETED = re.compile(r"""["'/\\.,?;*!%^&_+():<=>@\[\]{}]""")


def clean_report(text, mimic=False):
    """Clean a report by the rules of R2Gen -> words and full stops, separated by single blanks.

    "The heart is normal in size. 2. No effusion (XXXX)." becomes
    "the heart is normal in size . no effusion xxxx ."

    Numbers of a list are deleted. The rule for "1. " also takes the end of "T11. ", and the decimal
    point of 3.5 is deleted. Both are kept, so that scores can be compared with published ones.
    mimic: True for the texts of MIMIC-CXR, whose lines are wrapped. R2Gen joins the lines first. A
        text without line breaks gives the same words either way.
    """
    if mimic:
        text = text.replace("\n", " ")
        text = re.sub(r"_+", "_", text)
        text = re.sub(r" +", " ", text)
    text = re.sub(r"\.+", ".", text)
    text = text.replace("1. ", "")
    for number in (2, 3, 4, 5):
        # R2Gen replaces ". 2. " before. Here it leaves two full stops, of which one is deleted.
        text = text.replace(f" {number}. ", ". ")
    sentences = []
    for sentence in text.strip().lower().split(". "):
        sentences.append(DELETED.sub("", sentence))
    joined = " . ".join(sentences) + " ."
    return " ".join(joined.split())


def prepare_reports(subjects, notes):
    """Take away texts that are no report, and cut those that are too long.

    A text is no report if it has no letter and no digit, as where a report was made anonymous with
    underscores. Subject.report is then None, and the entry "text" of Subject.files is removed.

    notes: A list that gets sentences for the user.
    """
    empty = 0
    cut = 0
    damaged = 0
    for subject in subjects:
        if not re.search(r"[^\W_]", subject.report or ""):
            empty += 1
            subject.report = None
            subject.files.pop("text", None)
            continue
        # Bytes that are no UTF-8 became this character when the file was read.
        damaged += "\ufffd" in subject.report
        words = subject.report.split()
        if len(words) > MOST_WORDS:
            cut += 1
            subject.report = " ".join(words[:MOST_WORDS])
    if empty:
        notes.append(f"{empty} of {len(subjects)} subjects have no report: it is missing, empty, "
                     "or has underscores only")
    if cut:
        notes.append(f"{cut} reports have more than {MOST_WORDS} words; the rest is cut off")
    if damaged:
        notes.append(f"{damaged} reports hold the character \ufffd, which stands for bytes that "
                     "are not UTF-8")
