"""Sentences about scans for a frozen text tower: from sidecars, from typical values, from the user.

Part of Reference implementations of five medical-image-synthesis papers; MIT licence, see LICENSE.

A record says what is known of a scan, {field: value}; its units are those of data/prompts.py.
"""
import re

import numpy as np

from data import canonical_contrast, record_of, scan_fields
from data.layouts import CONTRASTS

PERSONAL = ("age", "sex", "voxel")      # all scans of one subject share these, once registered


def typical_records(subjects, contrasts):
    """The typical record of each contrast: {contrast: {field: value}}.

    Numbers are medians over the subjects' scans, and words are the most common ones.  A field that
    fewer than half of the scans know is left out.  subjects: list of layouts.Subject.
    """
    typical = {}
    for contrast in contrasts:
        records = [record_of(subject, contrast) for subject in subjects
                   if contrast in subject.files]
        fields = []
        for record in records:
            fields += [field for field in record if field not in fields]
        found = {}
        for field in fields:
            values = [record[field] for record in records if field in record]
            if 2 * len(values) < len(records):
                continue
            if isinstance(values[0], str):
                found[field] = max(sorted(set(values)), key=values.count)
            else:
                found[field] = np.median(np.array(values, float), axis=0).tolist()
        typical[contrast] = found
    return typical


def parse_target(text):
    """ "modality=T2w TE=90" -> (contrast, {field: value}); an empty text -> (None, {}).

    A PET is named by its tracer: modality=PET tracer=FDG is the contrast fdg.
    ValueError if the text is not like that, or says something twice.
    """
    if not text:
        return None, {}
    values = {}
    for word in text.split():
        field, equals, value = word.partition("=")
        if not equals or not value:
            raise ValueError(f'--target "{text}": write words such as modality=T2w TE=90')
        if field in values:
            raise ValueError(f'--target "{text}": {field} is said twice')
        try:
            values[field] = number_or_word(value)
        except ValueError as error:
            raise ValueError(f'--target "{text}": {error}') from None
    if "modality" not in values:
        raise ValueError(f'--target "{text}": say which modality=, such as T2w')
    modality = str(values.pop("modality"))
    if modality.lower() == "pet" and "tracer" in values:
        modality = str(values["tracer"])
    contrast = canonical_contrast(modality)
    require_fields(values, contrast, f'--target "{text}"')
    return contrast, values


def require_fields(fields, contrast, where):
    """ValueError if the sentence about a contrast does not tell one of these fields.

    An unknown contrast is refused elsewhere, by whoever knows what a model makes.
    """
    if contrast not in CONTRASTS:
        return
    there = scan_fields(contrast)
    unknown = [field for field in fields if field not in there]
    if unknown:
        raise ValueError(f"{where}: a sentence about {contrast} does not tell "
                         f"{', '.join(unknown)}; it tells {', '.join(there)}")


def file_tags(text):
    """What a target says, for the names of files: "modality=T2w TE=90" -> {"t2": "_TE-90"}."""
    contrast, values = parse_target(text)
    words = []
    for field, value in values.items():
        shown = f"{value:g}" if isinstance(value, float) else value
        words.append(f"_{field}-" + re.sub(r"[^\w.+-]", "-", shown))       # GE/UIH becomes GE-UIH
    return {contrast: "".join(words)}


def parse_sweep(text):
    """ "TE=60:140:9" -> ("TE", nine numbers from 60 to 140), 2 to 1000 of them; else ValueError."""
    field, _, numbers = text.partition("=")
    try:
        first, last, count = numbers.split(":")
        ends = float(first), float(last)
        if not field or not 2 <= int(count) <= 1000 or not np.isfinite(ends).all():
            raise ValueError
        return field, np.linspace(*ends, int(count))
    except ValueError:
        raise ValueError(f'--sweep "{text}": write field=first:last:number, such as '
                         "TE=60:140:9, with 2 to 1000 numbers") from None


def number_or_word(text):
    """The text as a number, if it is a finite one, else the text."""
    try:
        number = float(text)
    except ValueError:
        return text
    if not np.isfinite(number):
        raise ValueError(f"{text}: write a finite number")
    return number


class Records:
    """What is known of the scans of some subjects, also of scans that do not exist.

    subjects   list of layouts.Subject
    typical    {contrast: record}, see typical_records
    """

    def __init__(self, subjects, typical):
        self.typical = typical
        self.scans = {}                             # (subject, contrast) -> record
        self.people = {}                            # subject -> what all of its scans share
        for subject in subjects:
            person = self.people.setdefault(subject.name, {})
            for contrast in subject.files:
                record = record_of(subject, contrast)
                self.scans[subject.name, contrast] = record
                for field in PERSONAL:
                    if field in record:
                        person.setdefault(field, record[field])

    def of(self, name, contrast):
        """The record of a scan.  For a scan that does not exist: the typical one of its contrast,
        with what is known of the person."""
        if (name, contrast) in self.scans:
            return self.scans[name, contrast]
        return {**self.typical.get(contrast, {}), **self.people.get(name, {})}


def hidden_field(contrast, record, share, g):
    """For a share of the calls: the name of one field that the sentence tells, (name,); else ().

    The tracer of a PET is part of its modality, which is always told.  g: numpy generator.
    """
    told = [field for field in scan_fields(contrast) if field in record and field != "tracer"]
    if not told or g.random() >= share:
        return ()
    return (told[g.integers(len(told))],)
